"""What has gone wrong with Pallas elsewhere, held off by looking at the source and at the first call."""

import ast
import importlib
from pathlib import Path

import jax.numpy as jnp
import pytest

from kernels_pallas import mosaic_tpu

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "kernels_pallas").rglob("*.py"))
KERNELS = sorted(file.parent.name for file in FILES if file.name == "pallas_tpu.py")


def names(file):
    """Every name and attribute that a file reads or imports, dotted where the source has dots."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            yield from (f"{module}.{alias.name}" if module else alias.name for alias in node.names)


def users(*wanted):
    return {str(file.relative_to(ROOT)) for file in FILES if any(name.endswith(wanted) for name in names(file))}


def test_counts_of_programs_are_static():
    """jax 0.11.0 to 0.11.2 gives a kernel used with several grids a stale pl.num_programs."""
    assert not users("num_programs")


def test_kernels_are_called_in_one_place_a_platform():
    """A bare pl.pallas_call means the deprecated Triton backend on a GPU."""
    assert users("pallas_call") == {"kernels_pallas/mosaic_tpu.py"}
    assert users("plgpu.kernel", "mosaic_gpu.kernel") <= {"kernels_pallas/mosaic_gpu.py"}
    assert not [name for file in FILES for name in names(file) if "triton" in name.lower()]


def test_the_platform_is_never_that_of_this_process():
    """A program may be lowered for another machine."""
    assert not users("default_backend")


def test_unwritten_memory_stays_nan_in_tests():
    """Interpretation fills it with NaN, so that a kernel that reads it fails; nobody turns that off."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        if file != Path(__file__):
            assert 'uninitialized_memory="zero"' not in file.read_text(), file


@pytest.mark.parametrize("op", KERNELS)
def test_float16_is_refused_on_tpu(op):
    module = importlib.import_module(f"kernels_pallas.{op}")
    half = lambda *shape: jnp.ones(shape, jnp.float16)  # noqa: E731
    q, gates, flat = half(1, 8, 2, 8), half(1, 8, 2), half(1, 8, 16)
    calls = {
        "attention": lambda f, **options: f(q, q, q, causal=True, **options),
        "linear_attention": lambda f, **options: f(q, q, q, **options),
        "delta_rule": lambda f, **options: f(q, q, q, gates, **options),
        "selective_scan": lambda f, **options: f(flat, flat, half(16, 4), half(1, 8, 4), half(1, 8, 4), **options),
        "linear_recurrence": lambda f, **options: f(flat, flat, **options),
        "long_conv": lambda f, **options: f(flat, half(8, 16), **options),
        "causal_conv": lambda f, **options: f(flat, half(4, 16), **options),
        "decode_attention": lambda f, **options: f(q[:, 0], q, q, jnp.ones(1, jnp.int32), **options),
    }
    with mosaic_tpu.interpret(), pytest.raises(NotImplementedError, match="no float16; use bfloat16 or float32"):
        calls[op](getattr(module, op), implementation="pallas_tpu")
