"""Compiles functions for TPUs that are not there, with the compiler in the package libtpu (the extra `aot`).

Set up by `environment()` before jax is imported: nothing here needs a device, and nothing looks for one.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
PASSES = ("forward", "backward")


def missing() -> str:
    """Why nothing can be compiled here; empty if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return f"{sys.executable} has no libtpu, the TPU compiler; run: {sys.executable} -m pip install '.[aot]'"
    return ""


def environment(dump: Path | None = None) -> dict[str, str]:
    """The variables to set before jax is imported. dump: a folder for what the compiler tells of each kernel."""
    found = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        wanted = "final_bundles|final_hlo-static"  # of some seventy passes, which take as long to write as to run
        found["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={wanted}"
        )
    return found


def ops() -> list[str]:
    return sorted(file.stem for file in (ROOT / "scripts" / "tpu_cases").glob("[a-z]*.py"))


def cases(op: str) -> list[Any]:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"scripts.tpu_cases.{op}").CASES


def device(generation: str) -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


@contextlib.contextmanager
def target(device: Any) -> Iterator[None]:
    """Ops choose what they would on this device."""
    from kernels_pallas import dispatch

    with dispatch.target("tpu", device.device_kind):
        yield


def program(case: Any, which: str, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A case's forward pass, or its gradients with the cotangents as arguments; and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    def forward(*arguments: Any) -> Any:
        return case.function(*arguments, **options)

    if which == "forward":
        return forward, case.arguments
    inexact = [n for n, a in enumerate(case.arguments) if jnp.issubdtype(a.dtype, jnp.inexact)]
    shapes = jax.eval_shape(forward, *case.arguments)
    leaves = [s for s in jax.tree.leaves(shapes) if jnp.issubdtype(s.dtype, jnp.inexact)]

    def backward(arguments: tuple[Any, ...], cotangents: list[Any]) -> Any:
        def differentiable(*some: Any) -> list[Any]:
            filled = list(arguments)
            for n, value in zip(inexact, some):
                filled[n] = value
            return [y for y in jax.tree.leaves(forward(*filled)) if jnp.issubdtype(y.dtype, jnp.inexact)]

        return jax.vjp(differentiable, *(arguments[n] for n in inexact))[1](cotangents)

    return backward, (case.arguments, leaves)


def compile(case: Any, which: str, device: Any, **options: Any) -> Any:
    """The compiled program of a case's pass for one device."""
    import jax
    from jax.sharding import SingleDeviceSharding

    with target(device):
        function, arguments = program(case, which, **options)
        where = SingleDeviceSharding(device)
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arguments)
        return jax.jit(function).lower(*placed).compile()


def kernel_calls(case: Any, which: str, device: Any, **options: Any) -> dict[str, float]:
    """The kernels a pass calls, by name, and how often a loop around them turns, 1 without one."""
    import jax

    with target(device):
        function, arguments = program(case, which, **options)
        found: dict[str, float] = {}
        _calls(jax.make_jaxpr(function)(*arguments).jaxpr, 1.0, found)
        return found


def _calls(jaxpr: Any, times: float, found: dict[str, float]) -> None:
    import jax

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            name = equation.params["name"]
            found[name] = max(found.get(name, 0.0), times)
            continue
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                body = getattr(leaf, "jaxpr", leaf)
                if hasattr(body, "eqns"):
                    _calls(body, inner, found)
