"""The ledger of a sweep: an Optuna study in one SQLite file, a trial a job, so that any Optuna tool can read it.

WAITING -> RUNNING -> COMPLETE or FAIL; a job that was stopped goes back to WAITING. A finished trial never changes: the
retry of a failed job is a new trial with the same user attribute "job", and the newest trial of a job counts.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from experiments.sweeping.jobs import Job, definition_text

STUDY = "sweep"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the ledger says of a job."""

    trial: int
    state: str  # WAITING RUNNING COMPLETE FAIL
    attempt: int
    value: float | None
    reason: str | None


class Ledger:
    """The study in file; made whole or not at all."""

    def __init__(self, file: Path):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = RDBStorage(f"sqlite:///{file.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}})
        self._study = optuna.load_study(study_name=STUDY, storage=self._storage)

    @classmethod
    def create(cls, file: Path, jobs: Sequence[Job]) -> "Ledger":
        """Writes the jobs under another name, then renames: a killed start leaves nothing half made."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        new = file.with_name(file.name + ".new")
        for leftover in (new, new.with_name(new.name + "-journal")):
            leftover.unlink(missing_ok=True)
        storage = RDBStorage(f"sqlite:///{new.resolve()}")
        study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize")
        study.set_user_attr("definition", definition_text(jobs))
        distributions = _distributions(jobs)
        for job in jobs:
            study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params={key: _leaf(value) for key, value in job.overrides.items()},
                    distributions={key: distributions[key] for key in job.overrides},
                    user_attrs={"job": job.number, "name": job.name, "hash": job.hash, "attempt": 1},
                )
            )
        storage.remove_session()
        storage.engine.dispose()
        os.replace(new, file)
        return cls(file)

    @property
    def definition(self) -> str:
        return self._study.user_attrs["definition"]

    def entries(self) -> dict[int, Entry]:
        """The newest trial of every job, by the job's number."""
        return {number: _entry(trial) for number, trial in self._newest().items()}

    def start(self, job: int) -> None:
        self._set(job, TrialState.RUNNING)

    def wait(self, job: int) -> None:
        self._set(job, TrialState.WAITING)

    def complete(self, job: int, value: float) -> None:
        self._set(job, TrialState.COMPLETE, value)

    def fail(self, job: int, reason: str) -> None:
        trial = self._newest()[job]
        self._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        self._set(job, TrialState.FAIL)

    def retry(self, job: int) -> None:
        """A new trial for a failed job."""
        old = self._newest()[job]
        attributes = {key: value for key, value in old.user_attrs.items() if key != "reason"}
        self._study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=old.params,
                distributions=old.distributions,
                user_attrs={**attributes, "attempt": old.user_attrs["attempt"] + 1},
            )
        )

    def _newest(self) -> dict[int, FrozenTrial]:
        trials = sorted(self._study.get_trials(deepcopy=False), key=lambda trial: trial.number)
        return {trial.user_attrs["job"]: trial for trial in trials}

    def _set(self, job: int, state: TrialState, value: float | None = None) -> None:
        trial = self._newest()[job]
        if trial.state == state:
            return
        self._storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])


def _entry(trial: FrozenTrial) -> Entry:
    value = trial.values[0] if trial.values else None
    attributes = trial.user_attrs
    return Entry(trial.number, trial.state.name, attributes["attempt"], value, attributes.get("reason"))


def _distributions(jobs: Sequence[Job]) -> dict[str, BaseDistribution]:
    """Every key as a choice among the values it takes in this sweep."""
    values: dict[str, list[Any]] = {}
    for job in jobs:
        for key, value in job.overrides.items():
            seen = values.setdefault(key, [])
            if not any(_leaf(value) == other and type(_leaf(value)) is type(other) for other in seen):
                seen.append(_leaf(value))
    return {key: CategoricalDistribution(choices) for key, choices in values.items()}


def _leaf(value: Any) -> Any:
    return repr(value) if isinstance(value, list | tuple | dict) else value
