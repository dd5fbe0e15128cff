import functools

import jax
import jax.numpy as jnp
import pytest

from arch import flops
from kernels_pallas import costs
from kernels_pallas.attention.ref import attention_ref
from kernels_pallas.linear_attention.chunked import linear_attention_chunked

B, T, H, K, V, C = 2, 64, 3, 16, 8, 32


def shape(*size):
    return jax.ShapeDtypeStruct(size, jnp.float32)


def test_linear_attention_is_what_its_chunks_compute():
    form = functools.partial(linear_attention_chunked, chunk=C)
    run = lambda q, k, v, state: form(q, k, v, None, state)  # noqa: E731
    found = flops.count(run, shape(B, T, H, K), shape(B, T, H, K), shape(B, T, H, V), shape(B, H, K, V))
    assert costs.linear_attention(B, T, H, K, V, chunk=C, decay=None, itemsize=4).flops == found.products


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (5, 0), (3, 2), (None, 4)])
def test_visible_pairs_are_counted(left, right):
    for queries, keys in ((7, 7), (5, 9)):
        pairs = [(t + keys - queries, s) for t in range(queries) for s in range(keys)]
        want = sum((left is None or s >= t - left) and (right is None or s <= t + right) for t, s in pairs)
        assert costs.visible(queries, keys, left=left, right=right) == want


def test_attention_is_what_its_products_compute():
    def run(q, k, v):
        nothing = (None,) * 4
        options = {"window": (None, None), "block_mask": None, "scale": 1.0, "activation": "softmax"}
        return attention_ref(q, k, v, *nothing, **options)[0]

    found = flops.count(run, shape(B, T, H, K), shape(B, T, H, K), shape(B, T, H, V))
    cost = costs.attention(B, H, H, T, T, K, V, scores=costs.visible(T, T, left=None, right=None), itemsize=4)
    assert cost.flops - 5 * B * H * T * T == found.products
    assert cost.transcendentals == B * H * T * T


def test_bytes_are_each_array_once():
    cost = costs.linear_recurrence(B * T * K, B * K, itemsize=4)
    assert cost.bytes == 4 * (3 * B * T * K + 2 * B * K)
    cost = costs.decode_attention(1, 8, 2, 1000, 128, 128, itemsize=2)
    assert cost.bytes == 2 * (2 * 1000 * 256 + 8 * 256)
    assert cost.seconds(flops=1e15, bandwidth=1e9) == cost.bytes / 1e9


def test_costs_add_up_and_become_estimates():
    total = costs.Cost(1, 2, 3) + costs.Cost(10, 20, 30.4)
    estimate = total.estimate()
    assert (estimate.flops, estimate.bytes_accessed, estimate.transcendentals) == (11, 22, 33)
    assert costs.nbytes(shape(2, 3), None, jax.ShapeDtypeStruct((4,), jnp.bfloat16)) == 32
    assert costs.delta_rule(B, T, H, K, V, chunk=C, gated=True, itemsize=2).flops > 0
    forward = costs.selective_scan(B, T, K, 4, itemsize=4)
    assert costs.selective_scan(B, T, K, 4, itemsize=4, backward=True).flops > 2 * forward.flops
