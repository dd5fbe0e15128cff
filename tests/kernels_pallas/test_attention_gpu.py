"""The GPU kernels of attention: interpreted against the reference, and lowered to a CUDA module; cuDNN's refusals.

cuDNN itself cannot be run or lowered here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import dispatch
from kernels_pallas.attention.cudnn import attention_cudnn
from kernels_pallas.attention.pallas_gpu import attention_gpu
from kernels_pallas.attention.pallas_gpu_table import tables
from kernels_pallas.attention.ref import attention_ref, visible
from tests.kernels_pallas.gpu import grad_of, interpreted, lowered
from tests.numerics import rel_rms

PLAIN = {"window": (None, None), "block_mask": None, "scale": 0.3, "activation": "softmax"}
BLOCKS = np.array([[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]], bool)


def check(shape, *, keep=None, segments=None, mode=True, **options):
    """y, lse and the gradients of both against the reference."""
    batch, queries, keys, heads, groups, width, deep = shape
    rng = np.random.default_rng(0)
    sizes = ((batch, queries, heads, width), (batch, keys, groups, width), (batch, keys, groups, deep))
    arrays = [jnp.asarray(rng.standard_normal(size), "bfloat16") for size in sizes]

    def run(function, arrays):
        def loss(arrays):
            y, lse = function(*arrays, None, keep, segments, segments, **PLAIN | options)
            seen = (y, jnp.where(jnp.isfinite(lse), lse, 0.0))
            weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in seen)
            return sum((x * w).sum() for x, w in zip(seen, weights)), (y, lse)

        (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return dict(zip(("y", "lse", "dq", "dk", "dv"), (*outputs, *grads)))

    got = run(functools.partial(attention_gpu, interpret=mode), arrays)
    want = run(attention_ref, [x.astype(jnp.float32) for x in arrays])
    assert got["y"].dtype == jnp.bfloat16
    for name in want:
        assert rel_rms(got[name].astype(jnp.float32), want[name]) < 1e-2, name


@interpreted
def test_causal_grouped_heads():
    """Sizes that all differ, lengths that do not divide."""
    check((2, 101, 120, 4, 2, 5, 70), window=(None, 0))


@interpreted
def test_window_and_padding():
    keep = jnp.asarray(np.random.default_rng(1).random((1, 200)) < 0.7).at[0, :100].set(False)
    check((1, 130, 200, 2, 2, 64, 64), window=(70, 0), keep=keep)


@interpreted
def test_block_mask():
    """Tiles left out, and a row of tiles that sees nothing: y 0, lse -inf, no gradient."""
    check((1, 256, 256, 2, 2, 64, 64), block_mask=BLOCKS)


@interpreted
def test_segments():
    check((2, 128, 128, 2, 1, 128, 128), segments=jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, 128))))


@interpreted
def test_no_race(capsys):
    """More tiles than stages, so that shared memory is used again."""
    keep = jnp.ones((1, 256), bool)
    check((1, 256, 256, 1, 1, 64, 64), keep=keep, mode=plgpu.InterpretGPUParams(detect_races=True))
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


@pytest.mark.parametrize("window", [(None, 0), (70, 0), (30, 40), (None, None)])
@pytest.mark.parametrize("lengths", [(130, 200), (256, 256)])
@pytest.mark.parametrize("mask", [None, BLOCKS])
def test_tables(window, lengths, mask):
    """What is left out sees nothing, what needs no mask sees everything, both ways round."""
    if mask is not None and lengths != (256, 256):
        lengths = (512, 256)
    seen = np.asarray(visible(*lengths, None, None, None, window, mask))[0, 0]
    tiled = np.zeros((2, -(-lengths[0] // 64) * 64, -(-lengths[1] // 64) * 64), bool)
    tiled[0, : lengths[0], : lengths[1]], tiled[1, : lengths[0]] = seen, True
    for table, full in zip(tables(*lengths, window, mask, False), (tiled, tiled.swapaxes(1, 2))):
        for m in range(full.shape[1] // 64):
            chosen = table.visits[0, m, : table.counts[0, m]]
            for n in range(full.shape[2] // 64):
                part = full[:, m * 64 : m * 64 + 64, n * 64 : n * 64 + 64]
                found = chosen[chosen // 2 == n]
                assert len(found) == 1 if part[0].any() else True
                if len(found) and not found[0] % 2:
                    assert part[0][part[1]].all()


@pytest.mark.parametrize("options", [{"window": (None, 0)}, {"window": (128, 0)}, {"block_mask": BLOCKS}])
def test_lowers_for_hopper(options):
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 128), "bfloat16") for heads in (4, 2))
    run = lambda q, k, v: attention_gpu(q, k, v, *[None] * 4, **PLAIN | options)  # noqa: E731
    text = lowered(grad_of(jax.checkpoint(run)), q, k, k)
    for name in ("attention_forward", "attention_backward_queries", "attention_backward_keys"):
        assert name in text


@pytest.mark.parametrize(
    ("function", "shape", "options", "match"),
    [
        (attention_gpu, (64, 64, 64), {"activation": "sigmoid"}, "only the softmax"),
        (attention_gpu, (64, 64, 256), {}, "wider than 128"),
        (attention_gpu, (64, 64, 64), {"block_mask": np.ones((1, 2, 2), bool)}, "multiples of 64"),
        (attention_cudnn, (64, 64, 64), {"block_mask": np.ones((1, 1, 1), bool)}, "without a block mask"),
        (attention_cudnn, (64, 128, 64), {"window": (None, 0)}, "T=64 and S=128"),
        (attention_cudnn, (64, 64, 64), {"window": (8, 8)}, "windows end at the query"),
        (attention_cudnn, (64, 64, 65), {}, "multiple of 8"),
    ],
)
def test_refusals(function, shape, options, match):
    queries, keys, width = shape
    q, k = (jax.ShapeDtypeStruct((1, length, 1, width), "bfloat16") for length in (queries, keys))
    with dispatch.target("cuda", "NVIDIA H200"), pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(lambda q, k: function(q, k, k, *[None] * 4, **PLAIN | options), q, k)
