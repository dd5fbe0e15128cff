"""The default forms on eight devices: same numbers, and no communication but that of the caller's own sums."""

import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kernels_pallas.attention import attention
from kernels_pallas.linear_attention import linear_attention
from tests.numerics import rel_rms

ops = {
    "attention": lambda q, k, v: attention(q, k, v, causal=True),
    "linear_attention": lambda q, k, v: linear_attention(q, k, v)[0],
}
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
arrays = [jnp.asarray(rng.standard_normal((8, 300, 4, 8)), jnp.float32) for _ in range(3)]
for name, op in ops.items():
    run = jax.jit(jax.grad(lambda q, k, v: (op(q, k, v) ** 2).sum(), argnums=(0, 1, 2)))
    want = run(*arrays)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor"))) for x in arrays]
        compiled = run.lower(*placed).compile()
        got = compiled(*placed)
    print(name, max(rel_rms(a, b) for a, b in zip(got, want)) < 1e-5, got[0].sharding.spec, "HLO", compiled.as_text())
"""


@pytest.mark.exhaustive
def test_no_communication_on_eight_devices():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **flags}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^\w+ True P(?:artitionSpec)?\('data', None, 'tensor'", done.stdout, re.M)) == 2
    assert not re.findall(r"(?:all-gather|all-to-all|collective-permute|all-reduce)\(", done.stdout)
