"""The jobs of a sweep: what get_sweep() says, drawn, resolved, checked and compared with what was run before.

    get_sweep() -> [{"arg": "linear", "optimizer.lr": 1e-3, "seed": 0}, ...]        one flat dict a job, or
                   {"space": {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "arg": {"choices": (...)}},
                    "trials": 20, "seeds": 3, "sampler": "random" | "qmc", "seed": 0}

"arg" is the argument of get_config, every other key a path in the config. A search space is drawn before the first
job starts, by Optuna's seeded samplers that do not look at results, so that a sweep has the same jobs whatever the
number of workers and however often it was killed.
"""

import dataclasses
import difflib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from arch.errors import ConfigError, unknown
from experiments.runs import flatten

Overrides = dict[str, Any]
SPACE_KEYS = ("space", "trials", "seeds", "sampler", "seed")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int  # its place in get_sweep(), from 1
    overrides: Overrides
    argv: tuple[str, ...]  # for experiments.train, --workdir left out
    config: dict[str, Any]  # resolved
    hash: str

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def steps(self) -> int:
        return self.config["train"]["steps"]

    @property
    def label(self) -> str:
        """The arg of get_config, then what the job overrides: linear-lr0.001."""
        rest = [f"{k.rpartition('.')[2]}{v:.4g}" if isinstance(v, float) else f"{k.rpartition('.')[2]}{v}"
                for k, v in self.overrides.items() if k not in ("arg", "seed")]  # fmt: skip
        words = [str(self.overrides.get("arg") or ""), *rest]
        text = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(filter(None, words))).strip("-.")
        return text[:48] or "default"

    @property
    def name(self) -> str:
        return f"{self.number:03d}-{self.label}-s{self.seed}-{self.hash}"


def read(file: str, common: Sequence[str] = ()) -> list[Job]:
    """The jobs of the config file, each resolved and checked; common are overrides (as typed) for all of them.

    Raises:
      ConfigError: naming the first job that is wrong. Nothing has been started or written by then.
    """
    from experiments import config as configs  # imports JAX

    if ":" in file:
        raise ConfigError("--config", f"{file}: give the file alone; the arguments of get_config are in get_sweep()")
    get_sweep = getattr(configs.module(file), "get_sweep", None)
    if get_sweep is None:
        raise ConfigError("--config", f"{file} has no get_sweep(); write one, or run experiments.train once")
    definition = get_sweep()
    overrides = draw(definition) if isinstance(definition, Mapping) else definition
    if not isinstance(overrides, list | tuple) or not overrides:
        raise ConfigError("get_sweep", f"must return a list of overrides or a search space, not {overrides!r}")
    shared = {text.partition("=")[0].removeprefix("--config.") for text in common}
    jobs = []
    for number, job in enumerate(overrides, 1):
        try:
            if not isinstance(job, Mapping) or not all(isinstance(key, str) for key in job):
                raise ConfigError("overrides", f"must be a dict of config paths and values, not {job!r}")
            for key in sorted(shared.intersection(job)):
                raise ConfigError(key, "set by get_sweep() and on the command line; remove one")
            source = file if job.get("arg") is None else f"{file}:{job['arg']}"
            values = {key: value for key, value in job.items() if key != "arg"}
            argv = [f"--config={source}", *(configs.as_flag(key, value) for key, value in values.items()), *common]
            config = configs.load(argv).config
            _check_values(values, config)
        except ConfigError as error:
            raise ConfigError(f"job {number}: {error.path}", error.problem) from error.__cause__
        jobs.append(Job(number, dict(job), tuple(argv), _plain(config), configs.config_hash(config)))
    seen: dict[tuple[str, int], int] = {}
    for one in jobs:
        first = seen.setdefault((one.hash, one.seed), one.number)
        if first != one.number:
            raise ConfigError(f"job {one.number}", f"the same config and seed as job {first}; remove one of them")
    return jobs


def draw(definition: Mapping[str, Any]) -> list[Overrides]:
    """The jobs of a search space: `trials` seeded draws, each with seeds 0..seeds-1."""
    import optuna

    for key in definition:
        if key not in SPACE_KEYS:
            raise unknown(f"get_sweep.{key}", key, SPACE_KEYS, "key of a search space")
    samplers = {"random": optuna.samplers.RandomSampler, "qmc": optuna.samplers.QMCSampler}
    name = definition.get("sampler", "random")
    if name not in samplers:
        raise unknown("get_sweep.sampler", name, samplers, "sampler")
    for key in ("trials", *(("seeds",) if "seeds" in definition else ())):
        value = definition.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"get_sweep.{key}", f"must be a whole number of at least 1, not {value!r}")
    space = {key: _distribution(f"get_sweep.space.{key}", entry) for key, entry in definition["space"].items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():  # Optuna calls QMCSampler experimental; the draws are pinned by the ledger
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=samplers[name](seed=definition.get("seed", 0)))
    points: list[Overrides] = []
    for _ in range(definition["trials"]):
        trial = study.ask(space)
        study.tell(trial, 0.0)  # QMC numbers its points by finished trials
        if trial.params not in points:  # choices alone can repeat
            points.append(trial.params)
    if "seeds" not in definition:
        return points
    return [{**point, "seed": seed} for point in points for seed in range(definition["seeds"])]


def _distribution(path: str, entry: Mapping[str, Any]):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    keys = set(entry) if isinstance(entry, Mapping) else set()
    try:
        if keys == {"choices"}:
            return CategoricalDistribution(tuple(entry["choices"]))
        if {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
            whole = isinstance(entry["low"], int) and isinstance(entry["high"], int)
            return (IntDistribution if whole else FloatDistribution)(**entry)
    except (TypeError, ValueError) as error:
        raise ConfigError(path, str(error)) from None
    raise ConfigError(path, f'must be {{"choices": (...)}} or {{"low": a, "high": b, "log": True}}, not {entry!r}')


def _check_values(values: Mapping[str, Any], config: Any) -> None:
    """A value goes to the worker as text: proves that it comes back the same."""
    for key, value in values.items():
        found = config
        for part in key.split("."):
            found = found[part]
        if _plain(found) != _plain(value) or isinstance(found, bool) != isinstance(value, bool):
            raise ConfigError(key, f"asked for {value!r}, but the resolved config has {found!r}")


def _plain(value: Any) -> Any:
    """A config as JSON gives it back: dicts and lists."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def definition_text(jobs: Sequence[Job]) -> str:
    """The resolved jobs as text, compared line by line when a sweep is taken up again."""
    plain = [{"job": job.number, "label": job.label, "hash": job.hash, "config": job.config} for job in jobs]
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def difference(old: str, new: str, limit: int = 60) -> str:
    """A unified diff of two definitions, jobs that changed alike under one header; at most limit lines."""
    before = {job["job"]: job for job in json.loads(old)}
    after = {job["job"]: job for job in json.loads(new)}
    alike: dict[tuple[str, ...], list[int]] = {}
    for number in sorted(before | after):
        diff = difflib.unified_diff(_lines(before.get(number)), _lines(after.get(number)), n=0, lineterm="")
        changes = tuple(line for line in list(diff)[2:] if not line.startswith("@@"))
        if changes:
            alike.setdefault(changes, []).append(number)
    lines: list[str] = []
    for changes, numbers in alike.items():
        name = f"job{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        lines += [f"--- {name} in the ledger", f"+++ {name} now", *changes]
    return "\n".join(lines[:limit] + ([f"... {len(lines) - limit} more lines"] if len(lines) > limit else []))


def _lines(job: Mapping[str, Any] | None) -> list[str]:
    if job is None:
        return []
    return [f"label = {job['label']}", *(f"config.{k} = {v!r}" for k, v in sorted(flatten(job["config"]).items()))]


def read_in_child(file: str, common: Sequence[str] = ()) -> list[Job]:
    """read() in a short-lived process: this one never imports JAX nor takes an accelerator's memory."""
    child = subprocess.run(
        [sys.executable, "-m", "experiments.sweeping.jobs", file, *common],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if child.returncode:
        raise SystemExit(child.returncode)  # it has said why
    return [Job(**{**job, "argv": tuple(job["argv"])}) for job in json.loads(child.stdout.splitlines()[-1])]


if __name__ == "__main__":
    from experiments.cli import command

    def _main(argv: list[str]) -> None:
        print(json.dumps([dataclasses.asdict(job) for job in read(argv[0], argv[1:])]))

    sys.exit(command(_main)(sys.argv[1:]))
