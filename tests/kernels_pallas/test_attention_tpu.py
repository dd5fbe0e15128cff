"""The TPU kernels of attention by interpretation, against the whole score matrix in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.attention import attention, pallas_tpu_backward, tiles_tpu
from kernels_pallas.attention.pallas_tpu import attention_tpu
from kernels_pallas.attention.pallas_tpu_table import FULL, KIND, MASKED, NONE, STATIC, table
from kernels_pallas.attention.ref import attention_ref, visible
from tests.kernels_pallas.test_attention import make_inputs
from tests.numerics import rel_rms

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SMALL = {"forward": (128,) * 4, "backward": (128,) * 4}
HALVES = {"forward": (256, 256, 256, 128), "backward": (256, 256, 128, 256)}
OPEN = (None, None)
CAUSAL = (None, 0)


@functools.partial(jax.jit, static_argnums=0)
def forward_and_grads(function, arrays, masks):
    def loss(arrays):
        y, lse = function(*arrays, None, *masks)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        total, outputs = (y * weights).sum(), {"y": y}
        if lse is not None:
            weights = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
            total, outputs["lse"] = total + jnp.where(jnp.isfinite(lse), lse * weights, 0.0).sum(), lse
        return total, outputs

    (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs | dict(zip(("dq", "dk", "dv"), grads))


def check(
    shape,
    dtype="float32",
    *,
    keep=False,
    segments=False,
    window=CAUSAL,
    block_mask=None,
    activation="softmax",
    interpret=True,
    **options,
):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""
    arrays, given = make_inputs(*shape, keep=keep, segments=segments, dtype=dtype)
    arrays = (arrays["q"], arrays["k"], arrays["v"])
    masks = (given.get("keep"), *given.get("segment_ids", (None, None)))
    shared = {"window": window, "block_mask": block_mask, "scale": 0.3, "activation": activation}
    got = forward_and_grads(functools.partial(attention_tpu, **shared, **options, interpret=interpret), arrays, masks)
    whole = tuple(x.astype(jnp.float32) for x in arrays)
    want = forward_and_grads(functools.partial(attention_ref, **shared), whole, masks)
    assert got["y"].dtype == jnp.dtype(dtype)
    for name in want:
        assert rel_rms(got[name], want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_ref(dtype):
    """Sizes that all differ, several tiles of several parts, a length that does not divide."""
    check((2, 301, 301, 2, 1, 24, 40), dtype, **HALVES)


MASKS = {
    "one": ((2, 1, 1, 3, 1, 4, 5), {}),
    "last of many": ((2, 1, 70, 3, 3, 4, 5), {"keep": True}),
    "full": ((2, 140, 129, 2, 2, 8, 5), {"window": OPEN, "keep": True}),
    "more keys": ((2, 63, 301, 4, 2, 8, 7), {"keep": True}),
    "window": ((1, 301, 301, 2, 1, 8, 5), {"segments": True, "window": (37, 5)}),
    "aligned window": ((1, 512, 512, 1, 1, 8, 5), {"window": (127, 0)}),
    "keys behind": ((1, 303, 67, 2, 2, 8, 5), {"window": (8, 7)}),
    "sigmoid": ((2, 140, 140, 2, 1, 8, 5), {"keep": True, "activation": "sigmoid"}),
    "packed": ((2, 140, 140, 4, 4, 64, 64), {"keep": True}),
    "packed sigmoid": ((1, 130, 130, 2, 2, 64, 64), {"activation": "sigmoid"}),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case):
    shape, options = MASKS[case]
    check(shape, **options, **SMALL)


@pytest.mark.parametrize("heads", [1, 4])
def test_block_mask(heads):
    """Blocks that no tile divides, a row of blocks that sees nothing, with a window beside."""
    mask = np.random.default_rng(3).random((heads, 30, 20)) < 0.3
    mask[:, 3:20] = False
    check((2, 300, 300, 4, 2, 8, 7), block_mask=mask, window=(200, 0), **SMALL)


def test_bfloat16_masks():
    check((2, 140, 140, 4, 4, 64, 64), "bfloat16", keep=True, segments=True, window=(50, 10), **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 64, 101, 512, 1000])
def test_lengths(length, width, dtype):
    """With the tiles that a TPU would get."""
    check((1, length, length, 2, 2, width, width), dtype)


def test_two_kernels(monkeypatch):
    """dq in a kernel of its own, where its rows do not fit in VMEM."""
    monkeypatch.setattr(pallas_tpu_backward, "SLOTS", 0)
    check((2, 301, 301, 2, 1, 24, 41), **SMALL)


def plan(queries, keys, window, mask=None, marked=False):
    shape = (queries, keys, 1, 1, 8, 8)
    options = {"window": window, "block_mask": mask, "marked": marked, "scale": 1.0, "activation": "softmax"}
    return tiles_tpu.plan(shape, jnp.float32, **options, **SMALL)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("queries", "keys", "window"), [(900, 900, CAUSAL), (300, 700, (90, 0)), (700, 300, (40, 40))])
def test_table_visits_what_is_visible(by_columns, queries, keys, window):
    """Once each, none that is empty, in runs; a row's dq is kept in a place of its own from first to last."""
    chosen = plan(queries, keys, window)
    found = table(chosen, chosen.forward, by_columns)
    seen = np.asarray(visible(queries, keys, None, None, None, window, None))[0, 0]
    rows, columns = -(-queries // 128), -(-keys // 128)
    seen = np.pad(seen, ((0, 0), (0, -keys % 128)))
    blocks, some = (
        np.pad(seen, ((0, -queries % 128), (0, 0)), constant_values=value).reshape(rows, 128, columns, 128)
        for value in (True, False)  # of the queries made up to fill the tile, which may see anything
    )
    kinds = found.flags[0] & KIND
    visited = np.zeros((rows, columns), int)
    np.add.at(visited, (found.rows[0][kinds != NONE], found.columns[0][kinds != NONE]), 1)
    np.testing.assert_array_equal(visited, some.any((1, 3)))
    whole = blocks.all((1, 3))
    assert all(whole[i, j] for i, j, kind in zip(found.rows[0], found.columns[0], kinds) if kind == FULL)
    line = (found.columns if by_columns else found.rows)[0]
    assert (np.diff(line) >= 0).all()
    assert set(line) == set(range(columns if by_columns else rows))
    assert set(found.rows[0]) == set(range(rows)) or not by_columns
    open_rows: dict[int, int] = {}
    for row, slot, flags in zip(found.rows[0], found.slots[0], found.flags[0]) if by_columns else ():
        assert open_rows.setdefault(slot, row) == row
        if flags & 128:
            del open_rows[slot]
    assert not open_rows


def test_places_of_a_window_are_few():
    chosen = plan(128 * 64, 128 * 64, (127, 0))
    assert table(chosen, chosen.backward, True).most_slots <= 3
    assert table(chosen, chosen.backward, True).steps < 3 * 64
    kinds = table(chosen, chosen.backward, True).kinds()
    assert kinds <= {FULL, STATIC, STATIC + 1, NONE}


def test_marks_mask_every_tile():
    chosen = plan(512, 512, CAUSAL, marked=True)
    assert table(chosen, chosen.forward, False).kinds() == {MASKED}


def test_public_function():
    """By name, in a context, under vmap, checkpoint and a scan; without the context it is refused on a CPU."""
    arrays, _ = make_inputs(2, 20, 20, 2, 1, 5, 4)

    def loss(arrays, implementation):
        def each(arrays):
            arrays = jax.tree.map(lambda x: x[None], arrays)
            y, lse = attention(**arrays, causal=True, return_lse=True, implementation=implementation)
            return (y**2).sum() + lse.sum()

        return jax.lax.scan(lambda c, _: (c + jax.vmap(jax.checkpoint(each))(arrays).sum(), None), 0.0, length=2)[0]

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    with mosaic_tpu.interpret():
        got, grads = run(arrays, "pallas_tpu")
    want, wanted = run(arrays, "ref")
    assert rel_rms(got, want) < 1e-5
    for name in wanted:
        assert rel_rms(grads[name], wanted[name]) < 1e-5, name
    with pytest.raises(NotImplementedError, match="lowered for cpu"):
        attention(**arrays, causal=True, implementation="pallas_tpu")


def test_no_races(capsys):
    """The simulated memories: reads of unwritten ones give NaN, and two cores may work on rows and heads."""
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    check((1, 200, 200, 2, 1, 8, 5), keep=True, interpret=mode, **SMALL)
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


def test_refusals():
    q = jnp.ones((1, 8, 2, 8))
    wide = jax.eval_shape(lambda: jnp.ones((1, 4096, 1, 16384)))
    with mosaic_tpu.interpret():
        with pytest.raises(NotImplementedError, match="take no bias"):
            attention(q, q, q, causal=True, bias=jnp.zeros((1, 1, 8, 8)), implementation="pallas_tpu")
        with pytest.raises(NotImplementedError, match="float16"):
            attention(*[q.astype(jnp.float16)] * 3, causal=True, implementation="pallas_tpu")
        with pytest.raises(NotImplementedError, match="MiB of VMEM"):
            jax.eval_shape(lambda q: attention(q, q, q, causal=True, implementation="pallas_tpu"), wide)


def test_huge_scores_keep_their_gradients():
    """One key has all the weight, 1 in the backward pass too: scores of 1e6 have no digits to spare for it."""
    (q, k, v), masks = [make_inputs(1, 129, 129, 1, 1, 8, 8)[0][name] for name in "qkv"], (None, None, None)
    shared = {"window": CAUSAL, "block_mask": None, "scale": 0.3, "activation": "softmax"}
    got, want = (
        forward_and_grads(functools.partial(function, **shared, **options), (1e6 * q, k, v), masks)
        for function, options in ((attention_tpu, {"interpret": True}), (attention_ref, {}))
    )
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name
