"""The compile cache and the record of machine and software."""

import json
import os
import platform
import stat
import subprocess
import sys

import pytest

from experiments import environment

COMPILE = """
import json, jax, jax.numpy as jnp
import pytest

from experiments import environment
folder = environment.compile_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 5)))
print(json.dumps({"folder": str(folder), "hits": len(hits), "files": len(list(folder.iterdir()))}))
"""


def test_second_process_finds_the_programs_of_the_first(tmp_path):
    """However small they are and however quickly they compiled."""
    env = {**os.environ, "ARCHLOOM_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    first, second = (
        json.loads(subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, check=True).stdout)
        for _ in range(2)
    )
    assert first["hits"] == 0 < second["hits"]
    assert first["files"] == second["files"] > 0
    assert first["folder"] == second["folder"]
    assert stat.S_IMODE((tmp_path / "xla").stat().st_mode) == 0o700


def test_record_of_machine_and_software():
    found = environment.describe()
    assert set(found) == {
        "python", "packages", "platform", "device", "device_count", "cpu_count", "commit", "dirty", "command", "started"
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["optax"]
    assert "cores" in found["device"] or found["device_count"]
    assert environment.peak_bytes() > 1e7


FAULTS = """
import resource, sys
import numpy as np
import pytest

from experiments import environment
if sys.argv[1] == "keep":
    assert environment.keep_memory()
np.ones(1 << 24)  # the first time takes memory in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """20 blocks of 128 MiB, one after the other: without keep_memory each faults its pages in anew."""

    def faults(mode):
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert faults("keep") < 1000 < faults("leave")
