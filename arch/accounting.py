"""What a model costs, from shapes alone: parameters by part, FLOPs, saved activations, decode state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var

from arch import flops
from arch.errors import ConfigError
from arch.layers import cast
from arch.model import Functional, functional
from arch.registry import CHANNEL_MIXERS, HEADS, MIXERS, POSITIONS
from arch.spec import InputSpec, Spec
from arch.topologies.stack import Repeated
from kernels_pallas import dispatch


@dataclass(frozen=True)
class Part:
    """One row of the table: a part of the network, how often it stands there, what it costs in all."""

    name: str
    copies: int
    params: int
    flops: float  # forward, one example


@dataclass(frozen=True)
class Account:
    """Totals for one example of the longest length. Bytes are of float32 parameters and activations of `dtype`."""

    parts: tuple[Part, ...]
    params: int
    flops: float  # forward
    train_flops: float  # loss, gradient; recomputation (remat, tiled attention) included; the optimiser not
    activation_bytes: int  # kept from the forward for the backward pass, parameters not counted
    state_bytes: int | None  # decode state at the longest length; None if the model does not decode


def size(tree: Any) -> int:
    """Number of elements."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_params(model: Mapping[str, Any], spec: Spec) -> int:
    """Exact; takes some tens of milliseconds."""
    return size(functional(model, spec).abstract())


def parameter_table(model: Mapping[str, Any], spec: Spec) -> tuple[Part, ...]:
    """The parts with their parameters; no operation is counted, so a large model takes no longer than a small one."""
    net = functional(model, spec)
    return _parts(net, net.abstract(), {})


@dispatch.target("cpu")  # the XLA forms are counted, whatever device this is made on or for
def forward_flops(model: Mapping[str, Any], spec: Spec) -> float:
    """Of one example of the longest length."""
    net = functional(model, spec)
    return flops.count(_apply(net), net.abstract(), _inputs(spec)).flops


@dispatch.target("cpu")  # the XLA forms are counted, whatever device this is made on or for
def forward_macs(model: Mapping[str, Any], spec: Spec) -> float:
    """Multiply-accumulates in matrix products and convolutions of one example: what papers on vision call MACs."""
    net = functional(model, spec)
    return flops.count(_apply(net), net.abstract(), _inputs(spec)).products / 2


@dispatch.target("cpu")  # the XLA forms are counted, whatever device this is made on or for
def account(model: Mapping[str, Any], spec: Spec, *, dtype: Any = jnp.float32, remat: str = "none") -> Account:
    """The costs of a config's section `model` on a task's inputs."""
    net = functional(model, spec, remat=remat)
    params = net.abstract()
    forward = flops.count(_apply(functional(model, spec)), params, _inputs(spec))  # scopes are plain without remat
    return Account(
        parts=_parts(net, params, forward.scopes),
        params=size(params),
        flops=forward.flops,
        train_flops=flops.count(lambda p, x: jax.grad(_loss(net))(p, x), params, _inputs(spec)).flops,
        activation_bytes=_saved(net, params, _inputs(spec), dtype),
        state_bytes=_state(net, params, spec, dtype),
    )


def _inputs(spec: Spec, batch: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *spec.shape), jnp.dtype(spec.dtype))


def _apply(net: Functional) -> Any:
    def apply(params: Any, inputs: Any) -> Any:
        conditions = {name: jnp.zeros(x.shape, x.dtype) for name, x in net.conditions(inputs.shape[0]).items()}
        return net.apply(params, inputs, **conditions)

    return apply


def _loss(net: Functional) -> Any:
    apply = _apply(net)
    return lambda params, inputs: apply(params, inputs).sum()  # the loss proper is O(classes): nothing beside this


def _saved(net: Functional, params: Any, inputs: Any, dtype: Any) -> int:
    """Bytes of what the forward pass hands to the backward pass: the leaves of jax.vjp's function."""
    low = jax.eval_shape(lambda p: cast(p, dtype), params)
    closed = jax.make_jaxpr(lambda p, x: jax.tree.leaves(jax.vjp(lambda p: _loss(net)(p, x), p)[1]))(low, inputs)
    given = set(closed.jaxpr.invars)
    kept = {v for v in closed.jaxpr.outvars if isinstance(v, Var) and v not in given}
    return nbytes([v.aval for v in kept])


def _state(net: Functional, params: Any, spec: Spec, dtype: Any) -> int | None:
    low = jax.eval_shape(lambda p: cast(p, dtype), params)
    if not isinstance(spec, InputSpec):
        return None
    try:
        return nbytes(jax.eval_shape(lambda p: net.module(p).init_state(1, spec.length), low))
    except ConfigError:  # a classifier does not decode
        return None


def _parts(net: Functional, params: Any, scopes: Mapping[str, float]) -> tuple[Part, ...]:
    """One row for each kind of component; a parameter path or name scope counts to the component it lies under."""
    model = net.module(params)
    owners, times = _components(model), _times(model)
    rows: dict[str, tuple[set[str], int, float]] = {}
    for owner, name in owners.items():  # what costs nothing has its row too
        rows[name] = rows.get(name, (set(), 0, 0.0))[0] | {owner}, 0, 0.0

    def add(path: str, params: int, flops: float) -> None:
        owner = next((p for p in _prefixes(path) if p in owners), "")
        name = owners.get(owner) or ("embedding" if path.startswith(("embed", "cls")) else "norms, residuals, rest")
        copies, total, work = rows.get(name, (set(), 0, 0.0))
        rows[name] = copies | {owner}, total + params, work + flops

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        add(jax.tree_util.keystr(path, simple=True, separator="/"), math.prod(leaf.shape), 0.0)
    for scope, amount in scopes.items():
        add(scope, 0, amount)
    order = ("embedding", *dict.fromkeys(owners.values()), "norms, residuals, rest")
    copies = {
        name: sum(math.prod(times.get(p, 1) for p in _prefixes(owner)) for owner in row[0])
        for name, row in rows.items()
    }
    return tuple(Part(name, copies[name], *rows[name][1:]) for name in order if name in rows)


def _times(model: nnx.Module) -> dict[str, int]:
    """Path of every run of layers whose parameters are stacked: how many it stands for."""
    return {"/".join(map(str, keys)): m.times for keys, m in nnx.iter_modules(model) if isinstance(m, Repeated)}


def _prefixes(path: str) -> list[str]:
    """The path and its parents, the longest first."""
    keys = path.split("/")
    return ["/".join(keys[:n]) for n in range(len(keys), 0, -1)]


def _components(model: nnx.Module) -> dict[str, str]:
    """Path of every registered position encoding, mixer, channel mixer and head in the model: "mixer softmax".

    A mixer inside another belongs to it: "mixer bidirectional (mamba)". A module whose class says `part` has a row of
    that name.
    """
    found: dict[str, str] = {}
    registries = (POSITIONS, MIXERS, CHANNEL_MIXERS, HEADS)
    for keys, module in sorted(nnx.iter_modules(model), key=lambda item: len(item[0])):  # parents first
        path = "/".join(map(str, keys))
        if hasattr(type(module), "part"):
            found[path] = getattr(type(module), "part")  # noqa: B009  mypy knows no class attribute
        for registry in registries:
            name = registry.name_of(type(module))
            if name is None:
                continue
            outer = next((p for p in _prefixes(path) if p in found), None)
            if outer is None:
                found[path] = f"{registry.what} {name}"
            elif found[outer].startswith(registry.what) and f"({name}" not in found[outer]:
                found[outer] += f" ({name})"
    order = [*(registry.what for registry in registries[:-1]), "", registries[-1].what]  # the head comes last

    def place(name: str) -> int:
        return next((i for i, what in enumerate(order) if what and name.startswith(what)), order.index(""))

    return dict(sorted(found.items(), key=lambda item: place(item[1])))
