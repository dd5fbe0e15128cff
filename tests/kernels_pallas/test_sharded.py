"""Every op's default form on eight devices: same numbers, and no communication but that of the caller's own sums."""

import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.kernels_pallas.op_cases import CASES
from tests.numerics import rel_rms

mesh = {
    kind: jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(getattr(AxisType, kind),) * 2)
    for kind in ("Auto", "Explicit")
}
for name, case in CASES.items():
    arrays = case.arrays(8, 140, 4, 8)
    entry = {"B": "data", "H": "tensor", "D": "tensor"}
    specs = [P(*(entry.get(letter) for letter in letters)) for letters in case.axes]

    def gradients(*arrays):
        y, pull = jax.vjp(case.function, *arrays)
        return y, *pull(y)

    want = jax.jit(gradients)(*arrays)
    for kind in mesh:
        with jax.set_mesh(mesh[kind]):
            placed = [jax.device_put(x, NamedSharding(mesh[kind], spec)) for x, spec in zip(arrays, specs)]
            compiled = jax.jit(gradients).lower(*placed).compile()
            got = compiled(*placed)
        right = max(rel_rms(a, b) for a, b in zip(got, want)) < 1e-5
        cut = all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in zip(got[1:], placed))
        text = compiled.as_text()
        sums = text.count("all-reduce(")
        moves = sum(text.count(f"{word}(") for word in ("all-gather", "all-to-all", "collective-permute"))
        print("RESULT", name, kind, right, cut, sums, moves, flush=True)
"""

SHARED = {"selective_scan", "long_conv"}  # have arrays that all rows share: their gradients are summed over devices


@pytest.mark.exhaustive
def test_every_op_on_eight_devices():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **flags}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^RESULT (\w+) (\w+) (\w+) (\w+) (\d+) (\d+)$", done.stdout, re.M)
    assert len(found) == 2 * len({row[0] for row in found}) == 20
    for name, kind, right, cut, sums, moves in found:
        assert right == cut == "True", (name, kind, right, cut)
        assert int(moves) == 0, (name, kind, moves)
        assert (int(sums) > 0) == (name in SHARED), (name, kind, sums)
