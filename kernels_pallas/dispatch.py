"""Choice of an op's implementation: by the platform a program is lowered for; a name asked for is never swapped.

The platform is the one of `target`, else that of the mesh (`jax.set_mesh`), else of the environment variable
ARCHLOOM_PLATFORM. Where none is known, one form a platform is traced and the compiler keeps that of the platform it
lowers for (jax.lax.platform_dependent): so a program lowered on one machine for another gets the other's kernels.
"""

import contextvars
import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from kernels_pallas import mosaic_gpu, mosaic_tpu, sharded
from kernels_pallas.sharded import Axes

logger = logging.getLogger("archloom")
_logged: set[str] = set()

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
EVERYWHERE = "default"  # the key of AUTO for the platforms it does not name
KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "cudnn": "cuda"}  # implementations that run on one platform only

Auto = Mapping[str, Sequence[str]] | Sequence[str]

_target = jax.make_user_context(None)  # (platform, device kind), part of the key of every jit
_branch: contextvars.ContextVar[str | None] = contextvars.ContextVar("branch", default=None)


@contextmanager
def target(platform: str, device_kind: str | None = None) -> Iterator[None]:
    """Traces for one platform only, "cpu", "cuda", "rocm" or "tpu", whatever the mesh; also a decorator."""
    if platform not in PLATFORMS:
        raise ValueError(f"dispatch.target: platform must be one of {PLATFORMS}, got {platform!r}")
    with _target((platform, device_kind)):
        yield


def platform() -> str | None:
    """The platform an implementation is called for, or None if it is not known.

    To be read once, where an implementation is entered, and handed down: a backward pass is traced outside of it.
    """
    return _branch.get() or _known()[0]


def device_kind() -> str | None:
    """The kind of device an implementation is called for ("TPU v5 lite", ...), or None if it is not known."""
    return _known()[1]


def _known() -> tuple[str | None, str | None]:
    if _target.value is not None:
        return _target.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        name = {"gpu": "cuda"}.get(device.platform, device.platform)
        return ("rocm" if name == "cuda" and "NVIDIA" not in device.device_kind else name), device.device_kind
    name = os.environ.get("ARCHLOOM_PLATFORM") or None
    if name is not None and name not in PLATFORMS:
        raise ValueError(f"ARCHLOOM_PLATFORM must be one of {PLATFORMS} or unset, got {name!r}")
    return name, None


def call(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    auto: Auto,
    *args: Any,
    axes: Axes | None = None,
    dtypes: tuple[Any, ...] | None = None,
    **kwargs: Any,
) -> Any:
    """Calls the named implementation, or with None the first in `auto` that does not refuse its inputs.

    Args:
      auto: names in order of preference, or such a sequence for each platform, with "default" for those not named.
      axes: how the arrays are cut over a mesh; None leaves that to the compiler.
      dtypes: of the results; an implementation that returns another is cast.

    Raises:
      KeyError: no implementation has that name.
      NotImplementedError: it refuses these inputs; with None, all in `auto` do, and each one's reason is given.
    """
    run = _Op(op, implementations, axes, dtypes)
    check(op, implementations, implementation)
    if implementation is not None:
        if implementation in KERNELS or platform() is not None:
            with _for(KERNELS.get(implementation, _branch.get())):
                return run.named(implementation, args, kwargs)
        auto = {EVERYWHERE: (implementation,)}
    if not isinstance(auto, Mapping):
        return run.first(auto, args, kwargs)
    known = platform()
    if known is not None:
        return run.first(auto.get(known, auto[EVERYWHERE]), args, kwargs)
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def branch(name: str, names: Sequence[str]) -> Callable[..., Any]:
        def body(*arrays: Any) -> Any:
            filled = list(leaves)
            for n, array in zip(traced, arrays):
                filled[n] = array
            inner_args, inner_kwargs = jax.tree.unflatten(tree, filled)
            with _for(name):
                if implementation is not None:
                    return run.named(implementation, inner_args, inner_kwargs)
                return run.first(names, inner_args, inner_kwargs)

        return body

    auto = {"cpu": auto[EVERYWHERE], **auto}  # a form may differ on a CPU: it asks for the platform
    branches = {name: branch(name, names) for name, names in auto.items()}
    return jax.lax.platform_dependent(*(leaves[n] for n in traced), **branches)


def check(op: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None) -> None:
    """Raises KeyError if no implementation has that name: for inputs so empty that none is called."""
    if implementation is not None and implementation not in implementations:
        near = difflib.get_close_matches(implementation, implementations, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"{op} has no implementation {implementation!r}, only {sorted(implementations)}{hint}")


@contextmanager
def _for(name: str | None) -> Iterator[None]:
    token = _branch.set(name if name != EVERYWHERE else None)
    try:
        yield
    finally:
        _branch.reset(token)


class _Op:
    """One op's table of implementations, and how each is called."""

    def __init__(self, op, implementations, axes, dtypes):
        self.op, self.implementations, self.axes, self.dtypes = op, implementations, axes, dtypes

    def named(self, name: str, args: Any, kwargs: Any) -> Any:
        function = self.implementations[name]
        known = _known()[0]
        interpreted = mosaic_gpu.interpreted() if name == "pallas_gpu" else mosaic_tpu.interpreted()
        if name in KERNELS and known not in (None, KERNELS[name]) and not interpreted:
            raise NotImplementedError(f"{name} runs on {KERNELS[name]}, and this program is lowered for {known}")
        if self.axes is not None:
            result = sharded.call(self.op, lambda *arrays: function(*arrays, **kwargs), args, self.axes)
        else:
            result = function(*args, **kwargs)
        if self.dtypes is None:
            return result
        return tuple(x if x is None else x.astype(dtype) for x, dtype in zip(result, self.dtypes, strict=True))

    def first(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        reasons: list[str] = []
        for name in names:
            try:
                result = self.named(name, args, kwargs)
            except NotImplementedError as refusal:
                reasons.append(f"{name}: {refusal}")
                continue
            _log_once(self.op, name, reasons)
            return result
        raise NotImplementedError(f"{self.op}: every implementation refuses these inputs. " + "; ".join(reasons))


def _log_once(op: str, name: str, reasons: list[str]) -> None:
    """Says which implementation was chosen and why not an earlier one; the same choice is said once a process."""
    where = platform()
    message = f"{op}: chose {name!r}" + (f" for {where}" if where else "")
    message += f" ({'; '.join(reasons)})" if reasons else ""
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
