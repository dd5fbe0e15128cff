"""Every TPU kernel compiles, forward and backward, for every generation, and no slower than its record; no TPU needed.

The shapes are those of scripts/tpu_cases. What is measured is the compiler's own schedule: scripts/tpu_schedule.py.
"""

import functools
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import dispatch, mosaic_tpu

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import tpu_compile  # noqa: E402
import tpu_schedule  # noqa: E402

OPS = [op for op in tpu_compile.ops() if op != "peers"]
GENERATIONS = sorted(tpu_compile.TOPOLOGIES)

needs_compiler = pytest.mark.skipif(bool(tpu_compile.missing()), reason=tpu_compile.missing() or "libtpu is there")


@pytest.fixture(scope="module")
def table():
    return json.loads(tpu_schedule.TABLE.read_text())


@pytest.fixture(scope="module")
def matrix():
    """The results of all ops and generations, by two compilers at a time."""
    jobs = [tpu_schedule.job(op, g, "", list(tpu_compile.PASSES), [{}]) for op in OPS for g in GENERATIONS]
    return {tpu_schedule.key(result): result for result in tpu_schedule.run(jobs, at_once=2)}


def wanted(op):
    return [
        tpu_schedule.key({"op": op, "generation": generation, "pass": which, "case": case.name})
        for generation in GENERATIONS
        for case in tpu_compile.cases(op)
        for which in tpu_compile.PASSES
        if which == "forward" or case.backward
    ]


def test_every_op_with_a_tpu_kernel_has_cases():
    assert sorted(file.parent.name for file in (ROOT / "kernels_pallas").glob("*/pallas_tpu.py")) == OPS


@pytest.mark.parametrize("op", OPS)
def test_cases_are_of_both_precisions_and_of_one_name_each(op):
    cases = tpu_compile.cases(op)
    assert len({case.name for case in cases}) == len(cases)
    assert {jnp.dtype(case.arguments[0].dtype).name for case in cases} >= {"bfloat16", "float32"}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles(op, matrix):
    refused = {name: matrix.get(name, {"error": "no result"}).get("error") for name in wanted(op)}
    refused = {name: error for name, error in refused.items() if error}
    assert not refused
    kernels = {name: list(matrix[name]["kernels"]) for name in wanted(op)}
    assert all(kernels.values()), f"no kernel in {[name for name, found in kernels.items() if not found]}"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_schedule_has_grown(op, matrix, table):
    here = {name: importlib.metadata.version(name) for name in table["versions"]}
    if here != table["versions"]:
        pytest.skip(f"the table was made with {table['versions']}, and {here} are installed")
    results = [matrix[name] for name in wanted(op) if name in matrix]
    assert not tpu_schedule.compare([result for result in results if result.get("record", True)], table)


@needs_compiler
@pytest.mark.parametrize("op", OPS[:2])
def test_a_kernel_compiles(op):
    """A sample of the matrix for the quick suite."""
    case = min(tpu_compile.cases(op), key=lambda case: case.per)
    (result,) = tpu_schedule.run([tpu_schedule.job(op, "v5e", case.name, ["forward"], [{}])], at_once=1)
    assert "error" not in result, result["error"]
    assert result["bundles"] > 0
    assert result["kernels"]


def test_growth_is_found():
    result = {"op": "a", "generation": "v5e", "pass": "forward", "case": "b", "bundles": 1.06}
    assert tpu_schedule.compare([result], {tpu_schedule.key(result): {"bundles": 1.0}})
    assert not tpu_schedule.compare([result], {tpu_schedule.key(result): {"bundles": 1.02}})
    assert tpu_schedule.compare([result], {})
    assert tpu_schedule.compare([{**result, "error": "refused"}], {tpu_schedule.key(result): {"bundles": 2.0}})


WIDE = 65_536  # no tile of such a width fits


def blocks(*shapes, limit):
    """A call of a kernel with blocks of these shapes, float32, that may use so many bytes."""
    from jax.experimental import pallas as pl

    specs = [pl.BlockSpec(shape, lambda n: (0, 0)) for shape in shapes]
    return mosaic_tpu.call(
        lambda *refs: None,
        name="op_forward",
        grid=(1,),
        in_specs=specs[:-1],
        out_specs=specs[-1],
        out_shape=jax.ShapeDtypeStruct(shapes[-1], jnp.float32),
        semantics=("arbitrary",),
        cost=pl.CostEstimate(flops=0, bytes_accessed=0, transcendentals=0),
        vmem=limit,
    )


def test_what_overflows_vmem_is_refused_by_our_message():
    blocks((512, 1024), (512, 1024), limit=8 << 20)  # two of 2 MiB, two of each
    with pytest.raises(
        NotImplementedError, match=r"op_forward: its blocks and scratch need 8.0 MiB of VMEM, more than"
    ):
        blocks((512, 1024), (512, 1024), limit=(8 << 20) - 1)
    with pytest.raises(NotImplementedError, match="take smaller tiles or narrower heads"):
        blocks((8, 128), (8, 128), limit=mosaic_tpu.MOST + 1)


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "attention"])
def test_heads_too_wide_for_vmem_are_refused_by_our_message(op):
    """Before Mosaic's, which comes only when the whole model is compiled."""
    if op not in OPS:
        pytest.skip(f"{op} has no TPU kernel")
    function = getattr(importlib.import_module(f"kernels_pallas.{op}"), op)
    q = jax.ShapeDtypeStruct((1, 512, 1, WIDE), jnp.bfloat16)
    more = [jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)] if op == "delta_rule" else []
    options = {"causal": True} if op == "attention" else {}
    call = functools.partial(function, implementation="pallas_tpu", **options)
    with dispatch.target("tpu", "TPU v5 lite"), pytest.raises(NotImplementedError, match=r"VMEM|wide"):
        jax.eval_shape(call, q, q, q, *more)
