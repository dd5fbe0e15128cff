"""Scores a checkpoint of a run on a whole split.

    python -m experiments.evaluate --run=runs/linear --checkpoint=best --split=test
    python -m experiments.evaluate --run=runs/mamba --config.task.length=512       # the same task, longer

--config.task.* and --config.train.eval_batch_size replace what the run was trained with; a model with parameters for
every position cannot be longer. Prints one JSON object on standard output and one line to read on standard error.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from arch.errors import ConfigError
from experiments import cli, environment
from experiments import config as configs
from experiments.checkpoint import Checkpoints, Damaged
from experiments.data.task import note
from experiments.files import read_json
from experiments.program import Program, different


def choose(checkpoints: Checkpoints, which: str) -> int:
    """The step that "best", "last" or a number names."""
    if not (steps := checkpoints.steps()):
        raise ConfigError("--run", f"{checkpoints.folder} holds no checkpoint")
    known = f"kept: {', '.join(map(str, steps))}"
    if which == "last":
        return steps[-1]
    if which == "best":
        if (best := checkpoints.best()) is None:
            raise ConfigError("--checkpoint", f"no validation yet, so no best; name last or a step ({known})")
        return best
    if not which.isdigit() or int(which) not in steps:
        raise ConfigError("--checkpoint", f"{which!r} is not best, last or a step that is kept ({known})")
    return int(which)


def evaluate(folder: Path, which: str, split: str, overrides: Mapping[str, str] = MappingProxyType({})) -> dict:
    """{"run", "checkpoint", "step", "split", the objective's metrics, "examples"}, the majority-class level of a
    classifier's split, the task's note and the overrides if any."""
    program, params, step = checkpoint(folder, which, overrides)
    program.task.prepare()
    if split not in program.task.splits:
        raise ConfigError("--split", f"{split!r} is not one of {', '.join(program.task.splits)}")
    with jax.set_mesh(program.mesh):
        scores = program.evaluate(params, split)
    assert scores is not None  # nothing asks it to stop
    about = {"run": str(folder), "checkpoint": which, "step": step, "split": split}
    level = {"majority": program.task.majority(split)} if "accuracy" in scores else {}
    told = {"note": note(program.task)} if note(program.task) else {}
    return {**about, **scores, **level, **told, **({"overrides": overrides} if overrides else {})}


def checkpoint(
    folder: Path, which: str, overrides: Mapping[str, str] = MappingProxyType({})
) -> tuple[Program, Any, int]:
    """The run's program, the parameters that evaluation uses, and their step."""
    if not (folder / "config.json").exists():
        raise ConfigError("--run", f"{folder} has no config.json; name a run's folder")
    program = load(read_json(folder / "config.json")["config"], overrides)
    checkpoints, name = Checkpoints(folder / "checkpoints"), program.evaluated
    step = choose(checkpoints, which)
    with jax.set_mesh(program.mesh):
        try:
            _, state, _ = checkpoints.load_step(step, {name: program.state[name]})
        except Damaged as error:
            raise ConfigError("--checkpoint", f"step {step} is damaged: {error}; name another") from error
    return program, state[name], step


def load(config: Mapping[str, Any], overrides: Mapping[str, str]) -> Program:
    """The run's program with another task; its parameters must keep their shapes."""
    for path in overrides:
        if not path.startswith("task.") and path != "train.eval_batch_size":
            raise ConfigError(f"config.{path}", "only the task's options can differ from those of the run")
    trained = configs.plain(configs.resolve(config))
    changed = configs.plain(trained)
    configs.apply(changed, overrides)
    program = Program(configs.resolve(changed))
    if overrides and (change := different(Program(trained).functional.abstract(), program.functional.abstract())):
        raise ConfigError("config.task", f"the parameter {change} would change its shape with {', '.join(overrides)}")
    return program


def main(argv: list[str]) -> int:
    environment.compile_cache()
    parser = cli.Parser(prog="experiments.evaluate", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--split", default="test")
    _, overrides, flags = configs.split(argv, parser, required=False)
    found = evaluate(flags.run, flags.checkpoint, flags.split, overrides)
    print(json.dumps(found))
    level = f"accuracy {found['accuracy']:.4f} (majority {found['majority']:.4f}), " if "accuracy" in found else ""
    print(
        f"step {found['step']}: {found['split']} {level}loss {found['loss']:.4f}, {found['examples']} examples"
        + (f" ({found['note']})" if "note" in found else ""),
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    environment.quiet()
    environment.keep_memory()
    sys.exit(cli.command(main)(None))
