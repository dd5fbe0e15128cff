"""Shared by all tests: CPU only, a compilation cache that outlives the run, real shape checks by beartype."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# One form of an op is traced, not one a platform; what is lowered for others says so by dispatch.target.
os.environ.setdefault("ARCHLOOM_PLATFORM", "cpu")

import jax
import pytest

CACHE = Path(os.environ.get("ARCHLOOM_CACHE", Path(__file__).parent.parent / ".pytest_cache" / "archloom"))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache() -> None:
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled() -> Iterator[None]:
    """What a file compiled is of no use to the next; kept, a worker grows to 6 GB."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")
