"""What a run will need, before anything compiles.

    python -m experiments.plan --config=configs/quickstart.py:linear [--devices=8] [--match=params=2.1M] [--json]
    python -m experiments.plan --config=configs/quickstart.py:linear --draw=linear.svg
    python -m experiments.plan --config=configs/quickstart.py:softmax --against=configs/quickstart.py:wide

Parameters are exact. FLOPs follow arch/flops.py. Activations are an estimate: what the forward pass keeps for the
backward pass, which the compiler may still lessen. --match=params=N, flops=N (forward, one example) or layers=N solves
the width so that two architectures compare at equal budget within 1 %; params=FILE:ARG takes another config's budget.
--against=FILE:ARG, any number of times, sets configs beside each other, with the ratios of what they cost;
overrides (--config.path=value) are for all of them.
--draw writes a diagram of the built model (.svg, .png or .pdf), named after the config if no file is given.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from arch import accounting
from arch.accounting import Account
from arch.errors import ConfigError, within
from arch.registry import TASKS
from experiments import cli, drawing, match, optim, sharding
from experiments import config as configs

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclass(frozen=True)
class Plan:
    source: str
    config_hash: str
    account: Account
    optimizer: str
    batch_size: int
    mesh: dict[str, int]
    bytes_per_device: dict[str, int]


def make_plan(source: str, config: Any, devices: int = 1) -> Plan:
    """The costs of a resolved config on so many devices."""
    tree = configs.plain(config)
    spec = TASKS.build(tree["task"]).spec
    train = tree["train"]
    dtype = DTYPES[train["precision"]]
    found = accounting.account(tree["model"], spec, dtype=dtype, remat=train["remat"])
    mesh = mesh_shape(tree["mesh"], devices)
    return Plan(
        source=source,
        config_hash=configs.config_hash(config),
        account=found,
        optimizer=tree["optimizer"]["name"],
        batch_size=train["batch_size"],
        mesh=mesh,
        bytes_per_device=_bytes(tree, spec, found, mesh),
    )


def mesh_shape(mesh: Mapping[str, int], devices: int) -> dict[str, int]:
    """The section `mesh` with -1 replaced by what is left of the devices."""
    fixed = prod(size for size in mesh.values() if size != -1)
    shape = {axis: max(devices // fixed, 1) if size == -1 else size for axis, size in mesh.items()}
    shape = {axis: shape[axis] for axis in sharding.AXES}
    if prod(shape.values()) != devices:
        raise ConfigError("config.mesh", f"{shape} does not fill {devices} devices; see --devices")
    return shape


def _bytes(tree: Mapping[str, Any], spec: Any, found: Account, mesh: dict[str, int]) -> dict[str, int]:
    """Bytes on one device. Parameters, gradients, moments and averages follow the sharding rules."""
    from arch.model import functional

    params = functional(tree["model"], spec).abstract()
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    with within("config"):
        specs = sharding.parameter_specs(params, tree["sharding"], abstract)  # type: ignore[arg-type]
    optimizer = optim.build(tree["optimizer"], tree["train"]["steps"])
    state = {"params": params, "opt": jax.eval_shape(optimizer.direction.init, params)}

    def local(state: Any) -> int:
        leaves = jax.tree.leaves(sharding.state_shardings(state, specs, abstract))  # type: ignore[arg-type]
        shapes = [s.shard_shape(leaf.shape) for s, leaf in zip(leaves, jax.tree.leaves(state))]
        return sum(prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, jax.tree.leaves(state)))

    micro = tree["train"]["batch_size"] / tree["optimizer"]["accumulate"]
    weights = local({"params": params})
    rows = {
        "parameters": weights,
        "gradients": weights,
        "optimizer state": local({"opt": state["opt"]}),
        "averaged parameters": weights if tree["optimizer"]["ema"] is not None else 0,
        "activations (estimate)": round(
            found.activation_bytes * micro / (mesh["data"] * mesh["fsdp"] * mesh["sequence"])
        ),
    }
    return {**rows, "total": sum(rows.values())}


def text(plan: Plan) -> str:
    """The table, as printed; equal on every machine for the same config and jax."""
    a = plan.account
    lines = [
        f"{plan.source}  {plan.config_hash}",
        "",
        f"{'part':32}{'copies':>8}{'parameters':>14}{'':>8}{'FLOPs/example':>16}{'':>8}",
    ]
    for part in a.parts:
        lines.append(_row(part.name, part.copies, part.params, part.flops, a))
    lines += [_row("total", "", a.params, a.flops, a), ""]
    lines.append(
        f"FLOPs of an example: forward {si(a.flops)}, training {si(a.train_flops)} ({a.train_flops / a.flops:.2f}x)"
    )
    lines.append(f"FLOPs of a step: {si(a.train_flops * plan.batch_size)} (batch {plan.batch_size})")
    decode = "none (does not decode)" if a.state_bytes is None else binary(a.state_bytes)
    lines.append(f"decode state of a sequence: {decode}")
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines += ["", f"bytes on each of {prod(plan.mesh.values())} device(s): {axes}; optimizer {plan.optimizer}"]
    lines += [f"  {name:30}{binary(size):>12}" for name, size in plan.bytes_per_device.items()]
    return "\n".join(lines)


def _row(name: str, copies: int | str, params: int, flops: float, a: Account) -> str:
    return f"{name:32}{copies:>8}{params:>14,}{params / a.params:>8.1%}{si(flops):>16}{flops / a.flops:>8.1%}"


def si(value: float) -> str:
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {suffix}"
    return f"{value:.0f}  "


def binary(value: float) -> str:
    for scale, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.2f} {suffix}"
    return f"{value:.0f} B"


def matched(config: Any, request: str) -> tuple[Any, match.Match]:
    """The config with its width solved for the budgets of --match."""
    tree = configs.plain(config)
    spec = TASKS.build(tree["task"]).spec
    wanted = match.parse(request)
    layers = wanted.pop("layers", None)
    if layers is not None and not (layers.isdigit() and int(layers) > 0):
        raise ConfigError("--match", f"layers={layers} is not a positive whole number")
    budget = {name: _budget(name, value, spec) for name, value in wanted.items()}
    found = match.match(tree["model"], spec, layers=None if layers is None else int(layers), **budget)
    return configs.resolve({**tree, "model": found.model}), found


def _budget(name: str, value: str, spec: Any) -> float:
    if value.partition(":")[0].endswith(".py"):
        other = configs.plain(configs.configure(value))
        return match.BUDGETS[name](other["model"], spec)
    try:
        target = match.number(value)
    except ValueError:
        raise ConfigError("--match", f"{name}={value} is neither a number such as 2.1M nor a config file") from None
    if target <= 0:
        raise ConfigError("--match", f"{name}={value} is not above 0")
    return target


def drawn(source: str, config: Any, file: str) -> None:
    """Writes the diagram and says what is on it."""
    tree = configs.plain(config)
    name = source.removeprefix("configs/").replace(".py", "")
    path = Path(file or f"{name.replace('/', '_').replace(':', '-')}.svg")
    scene = drawing.draw(tree["model"], TASKS.build(tree["task"]).spec, name, path)
    params = sum(box.params * box.copies for box in scene.boxes)
    print(f"{path}: {len(scene.boxes)} boxes, {params:,} parameters")


@cli.command
def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m experiments.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=1, help="devices to plan for")
    parser.add_argument("--match", help="params=2.1M, flops=3G, layers=2, or params=FILE.py:ARG")
    parser.add_argument("--against", action="append", default=[], metavar="FILE:ARG", help="compare with this config")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--draw", nargs="?", const="", metavar="FILE", help="write a diagram: .svg, .png or .pdf")
    loaded = configs.load(argv, parser)
    config, flags = loaded.config, loaded.flags
    if flags.devices < 1:
        raise ConfigError("--devices", f"{flags.devices} is not a positive number")
    found = None
    if flags.match:
        config, found = matched(config, flags.match)
    if flags.draw is not None:
        return drawn(loaded.source, config, flags.draw)
    plan = make_plan(loaded.source, config, flags.devices)
    if flags.against:
        from experiments import against  # it imports this module

        others = ((other, configs.configure(other, loaded.overrides)) for other in flags.against)
        plans = [plan, *(make_plan(source, other, flags.devices) for source, other in others)]
        print(json.dumps(against.as_json(plans), indent=1) if flags.json else against.text(plans))
        return
    if flags.json:
        print(json.dumps({**asdict(plan), "match": asdict(found) if found else None}, indent=1))
        return
    print(text(plan))
    if found:
        print(f"\n{found}")


if __name__ == "__main__":
    sys.exit(main())
