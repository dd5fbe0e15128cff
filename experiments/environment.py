"""The machine and the software of a run, as environment.json and summary.json tell it, and the compile cache."""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("archloom", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def compile_cache() -> Path:
    """Turns on JAX's persistent compilation cache, for everything, in a folder that only this user can read.

    $ARCHLOOM_CACHE or ~/.cache/archloom holds it. A compiled program is code: another user's folder is refused;
    each kind of processor has its own, so that a home shared by machines gives none the instructions of another.
    """
    root = Path(os.environ.get("ARCHLOOM_CACHE") or Path.home() / ".cache" / "archloom") / "xla"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; set ARCHLOOM_CACHE to a folder of your own")
    root.chmod(0o700)
    processor = hashlib.sha256("\n".join(_cpuinfo("model name", "flags", "Features")).encode()).hexdigest()[:8]
    folder = root / f"{platform.machine()}-{processor}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def describe() -> dict[str, Any]:
    """The contents of environment.json."""
    commit, dirty = source_version()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": device(),
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "commit": commit,
        "dirty": dirty,
        "command": ["python", *sys.orig_argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return None


def source_version() -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of the source tree; None where it is not a git checkout."""
    root = Path(__file__).resolve().parent.parent
    git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=20)
    try:
        if not (root / ".git").exists():
            return None, None
        commit = git(["git", "rev-parse", "HEAD"])
        status = git(["git", "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    return (commit.stdout.strip() or None, bool(status.stdout.strip())) if commit.returncode == 0 else (None, None)


@functools.cache
def device() -> str:
    """The accelerator's name, or the processor's."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    for name in _cpuinfo("model name"):
        return f"{name} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _cpuinfo(*fields: str) -> list[str]:
    """The values of these fields for the first processor, where the system tells them."""
    file = Path("/proc/cpuinfo")
    first = file.read_text().split("\n\n")[0] if file.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() in fields]


def peak_bytes() -> int:
    """The most memory used so far: of the first device where it counts, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # Linux counts KiB


def reset_peak() -> bool:
    """Has peak_bytes count from now on; False where the system does not let it (it then counts from the start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def keep_memory() -> bool:
    """Has glibc keep the memory that a step frees for the next step; False where there is no glibc.

    By default it gives large blocks back to the system and takes them anew, each page by a fault: on a CPU up to half
    as much time again as the step itself. So: one arena (the others cannot grow to a step's size), no separate
    mappings below 1 GiB, no trimming. The price is memory, at worst about twice as much; $ARCHLOOM_MALLOC=system
    leaves glibc as it is. Call it before JAX starts its threads.
    """
    if os.environ.get("ARCHLOOM_MALLOC") == "system":
        return False
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((arena_max, 1), (mmap_threshold, 1 << 30), (trim_threshold, -1))
    return min(mallopt(*setting) for setting in settings) == 1  # each returns 1, or 0 where refused


def quiet() -> None:
    """Log lines as they are, and only warnings of libraries, which have set up logging themselves by now."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("archloom").setLevel(logging.INFO)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
