"""Continual training: a run that starts from another run's checkpoint, most often to go on with longer sequences.

    python -m experiments.train --config=... --config.task.length=8192 --init_from=runs/short --workdir=runs/long

What is taken over, from the checkpoint that --init_step names ("last", "best" or a step):
    parameters    all, and they must agree in path and shape. The one exception is a table of learned positions, which
                  may be shorter: its rows are copied, and the new places repeat them from the first place on (Beltagy
                  et al. 2020, arXiv:2004.05150); the row of a CLS token stays one.
    optimiser     its moments, their count and the averaged parameters, with --init_optimizer=true (the default);
                  moments of the table's rows as the rows. With false they start as in a fresh run.
What is not: the step and with it the schedule, which runs from its beginning over train.steps; the data order and the
random numbers, which are those of this run's own seed.

The origin (run, config hash, seed, step, SHA-256 of the parameters) is kept in config.json and summary.json, and what
of it changes the result of a cell of runs is part of the run's hash. A run that was stopped goes on from its own
checkpoints and asks nothing of the origin; one stopped before its first checkpoint begins again from the same bits,
or says that they are gone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arch.errors import ConfigError
from arch.spec import InputSpec
from experiments.checkpoint import Checkpoints, Damaged, param_hash
from experiments.evaluate import choose
from experiments.files import read_json
from experiments.program import Program
from experiments.sharding import paths

TABLE = "positions/table"  # learned positions, and whatever the optimiser holds of them
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags --init_from, --init_step and --init_optimizer."""

    folder: Path
    step: str = "last"
    optimizer: bool = True

    def asked(self) -> dict[str, Any]:
        """What must be asked again for the run to go on."""
        return {"run": str(self.folder.resolve()), "asked": self.step, "optimizer": self.optimizer}


def request(flags: Any) -> Request | None:
    """What the flags ask for; ConfigError if they say how to start from a run, and from none."""
    if flags.init_from is None:
        for name in ("init_step", "init_optimizer"):
            if getattr(flags, name) is not None:
                raise ConfigError(f"--{name}", "says how to start from a run; name it with --init_from=RUN")
        return None
    return Request(flags.init_from, flags.init_step or "last", flags.init_optimizer != "false")


def find(program: Program, request: Request) -> dict[str, Any]:
    """The record of an origin that fits the program. Reads the parameters, to tell their hash."""
    if not (request.folder / "config.json").exists():
        raise ConfigError("--init_from", f"{request.folder} has no config.json; name a run's folder")
    saved = read_json(request.folder / "config.json")
    try:
        step = choose(Checkpoints(request.folder / "checkpoints"), request.step)
    except ConfigError as error:
        path = {"--run": "--init_from", "--checkpoint": "--init_step"}[error.path]
        raise ConfigError(path, error.problem) from error
    record = {**request.asked(), "config_hash": saved["hash"], "seed": saved["seed"], "step": step}
    _check(program, record)
    return {**record, "param_hash": param_hash(_load(program, record, ("params",))["params"])}


def run_hash(config_hash: str, record: Record | None) -> str:
    """The hash of a run's config, the origin's cell included: its hash and step (or that it is its best), no seeds."""
    if record is None:
        return config_hash
    at = "best" if record["asked"] == "best" else record["step"]
    origin = [config_hash, record["config_hash"], at, record["optimizer"]]
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]


def check_asked(workdir: Path, saved: Record | None, request: Request | None) -> None:
    """Refuses to go on with a run from another origin than was asked for."""
    mine = None if request is None else request.asked()
    theirs = None if saved is None else {name: saved[name] for name in ("run", "asked", "optimizer")}
    if mine == theirs:
        return
    began = "fresh parameters; leave --init_from out" if theirs is None else _flags(theirs)
    raise ConfigError("--init_from", f"{workdir} began from {began}, or name another folder")


def _flags(asked: Record) -> str:
    flags = f"--init_from={asked['run']} --init_step={asked['asked']}"
    return f"{asked['run']}; ask for {flags} --init_optimizer={str(asked['optimizer']).lower()}"


def start(program: Program, record: Record) -> Any:
    """The state before the first step, from the origin."""
    taken = ("params", *(("opt", "ema") if record["optimizer"] else ()))
    _check(program, record)
    found = _load(program, record, tuple(name for name in taken if name in program.state))
    if (now := param_hash(found["params"])) != record["param_hash"]:
        raise ConfigError(
            "--init_from",
            f"step {record['step']} of {record['run']} was {record['param_hash'][:12]} when this run began and is "
            f"{now[:12]} now; bring it back or name another --workdir",
        )
    table = {name: _extended(program, tree, name) for name, tree in found.items()}
    if "ema" in program.state and "ema" not in table:
        table["ema"] = jax.tree.map(jnp.copy, table["params"])
    return {**program.init(), **table}


def _check(program: Program, record: Record) -> None:
    """Every parameter, and every leaf of the optimiser if it is wanted, is there and of a shape that can be taken."""
    saved = _saved(record)
    for name in ("params", "opt") if record["optimizer"] else ("params",):
        mine = {f"{name}/{path}": tuple(leaf.shape) for path, leaf in paths(program.state[name]).items()}
        theirs = {path: shape for path, shape in saved.items() if path.split("/")[0] == name}
        for path in {**mine, **theirs}:
            here, there = mine.get(path), theirs.get(path)
            if here == there or (here and there and _can_extend(program, path, there, here)):
                continue
            remedy = "these must agree; only a table of learned positions can grow, and only with its length"
            if name == "opt":
                remedy = "take the same optimizer, or --init_optimizer=false"
            raise ConfigError(
                "--init_from",
                f"{path} is {_shape(there)} in {record['run']} and {_shape(here)} in this config; {remedy}",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"{shape}"


def _can_extend(program: Program, path: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """One row a place, as many columns, and more rows than before."""
    if not path.endswith(TABLE) or not isinstance(program.task.spec, InputSpec):
        return False
    return len(old) == len(new) == 2 and old[1] == new[1] and _first_place(program, new[0]) < old[0] < new[0]


def _first_place(program: Program, rows: int) -> int:
    """The row of the first token: 1 where a CLS token has row 0."""
    return rows - program.task.spec.length


def _saved(record: Record) -> dict[str, tuple[int, ...]]:
    """Shapes in the origin's checkpoint by path."""
    try:
        return Checkpoints(Path(record["run"]) / "checkpoints").shapes(record["step"])
    except Damaged as error:
        raise _unreadable(record, error) from error


def _unreadable(record: Record, error: Damaged) -> ConfigError:
    return ConfigError(
        "--init_from",
        f"step {record['step']} of {record['run']} cannot be read: {error}; name another with --init_step",
    )


def _load(program: Program, record: Record, names: tuple[str, ...]) -> dict[str, Any]:
    """These parts of the state as the origin has them; a table that will grow on every device."""
    saved = _saved(record)
    names = tuple(name for name in names if any(path.startswith(f"{name}/") for path in saved))  # it may have no ema

    def as_saved(keys: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        shape = saved.get(path, leaf.shape)
        if shape == leaf.shape:
            return leaf
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=program.replicated)

    abstract = jax.tree_util.tree_map_with_path(as_saved, {name: program.state[name] for name in names})
    try:
        return Checkpoints(Path(record["run"]) / "checkpoints").load_step(record["step"], abstract)[1]
    except Damaged as error:
        raise _unreadable(record, error) from error


def _extended(program: Program, tree: Any, name: str) -> Any:
    """The tree in the shapes of program.state[name]."""

    def fit(leaf: Any, wanted: Any) -> Any:
        if leaf.shape == wanted.shape:
            return leaf
        first = _first_place(program, wanted.shape[0])
        place = np.arange(wanted.shape[0])
        row = np.where(place < first, place, first + (place - first) % (leaf.shape[0] - first))
        return jax.device_put(jnp.take(leaf, row, axis=0), wanted.sharding)

    return jax.tree.map(fit, tree, program.state[name])
