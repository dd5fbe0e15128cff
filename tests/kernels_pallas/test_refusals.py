"""What ops say of arguments that do not fit where jaxtyping does not check them first: in a program of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = """
import json
import jax.numpy as jnp
from kernels_pallas.attention import attention
from kernels_pallas.causal_conv import causal_conv
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.long_conv import long_conv
from kernels_pallas.selective_scan import selective_scan

x, half, few = jnp.zeros((2, 8, 2, 4)), jnp.zeros((1, 8, 2, 4)), jnp.zeros((2, 5, 2, 4))
ids, flat, cache = jnp.zeros((2, 8), int), jnp.zeros((2, 8, 4)), jnp.zeros((2, 9, 2, 4))
none, empty, bare = flat[:, :0], x[:, :0], jnp.zeros((4, 3))
N = jnp.zeros((2, 0, 3))
CALLS = {
    "attention rows": lambda: attention(x, half, half, causal=True),
    "attention keep": lambda: attention(x, few, few, causal=False, keep=ids > 0),
    "attention one id": lambda: attention(x, x, x, causal=True, segment_ids=(ids, None)),
    "attention ids": lambda: attention(x, few, few, causal=False, segment_ids=(ids, ids)),
    "decode rows": lambda: decode_attention(x[:, 0], half, half, jnp.zeros(2, int)),
    "decode width": lambda: decode_attention(x[:, 0], cache[..., :3], cache, jnp.zeros(2, int)),
    "decode values": lambda: decode_attention(x[:, 0], cache, x, jnp.zeros(2, int)),
    "decode lengths": lambda: decode_attention(x[:, 0], cache, cache, jnp.zeros(1, int)),
    "conv bias": lambda: causal_conv(flat, flat[0, :3], bias=jnp.zeros(3)),
    "conv keep": lambda: causal_conv(flat, flat[0, :3], keep=jnp.ones((2, 7), bool)),
    "recurrence reset": lambda: linear_recurrence(flat, flat, reset=jnp.ones((2, 7), bool)),
    "attention typo": lambda: attention(empty, empty, empty, causal=True, implementation="typo"),
    "decode typo": lambda: decode_attention(x[:, 0], empty, empty, jnp.zeros(2, int), implementation="typo"),
    "conv typo": lambda: causal_conv(none, flat[0], implementation="typo"),
    "delta typo": lambda: delta_rule(empty, empty, empty, empty[..., 0], implementation="typo"),
    "linear typo": lambda: linear_attention(empty, empty, empty, implementation="typo"),
    "recurrence typo": lambda: linear_recurrence(none, none, implementation="typo"),
    "long typo": lambda: long_conv(none, flat[0, :0], implementation="typo"),
    "scan typo": lambda: selective_scan(none, none, bare, N, N, implementation="typo"),
}
said = {}
for name, call in CALLS.items():
    try:
        said[name] = f"returned {call()}"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""
FIELDS = {
    "attention rows": "ValueError: attention: q",
    "attention keep": "ValueError: attention: keep (2, 8) must be (2, 5)",
    "attention one id": "ValueError: attention: segment_ids",
    "attention ids": "ValueError: attention: segment_ids of the keys (2, 8) must be (2, 5)",
    "decode rows": "ValueError: decode_attention: q",
    "decode width": "ValueError: decode_attention: q",
    "decode values": "ValueError: decode_attention: q",
    "decode lengths": "ValueError: decode_attention: lengths (1,) must be (2,)",
    "conv bias": "ValueError: causal_conv: bias (3,) must be (4,)",
    "conv keep": "ValueError: causal_conv: keep (2, 7) must be [B T] = (2, 8)",
    "recurrence reset": "ValueError: linear_recurrence: reset (2, 7) must be (2, 8)",
} | {f"{op} typo": "KeyError" for op in "attention decode conv delta linear recurrence long scan".split()}


@pytest.fixture(scope="module")
def said():
    root = Path(__file__).parent.parent.parent
    ran = subprocess.run([sys.executable, "-c", CALLS], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("call", FIELDS)
def test_the_field_is_named(call, said):
    assert said[call].startswith(FIELDS[call])
