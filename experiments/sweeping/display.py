"""What a sweep shows: a live table in a terminal, plain lines elsewhere."""

import dataclasses
import sys
import time
from collections.abc import Collection
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments import runs
from experiments.formats import duration
from experiments.sweeping.jobs import Job

STYLES = {"running": "bold cyan", "done": "green", "failed": "bold red", "interrupted": "yellow", "orphan": "yellow"}
WORDS = {"orphan": "ending"}  # the worker of a killed sweep is still saving
REFRESH, PLAIN = 0.5, 15.0  # seconds between redraws, and between plain lines of one job


@dataclasses.dataclass
class State:
    """A job as the display sees it."""

    job: Job
    folder: Path
    state: str = "waiting"  # waiting running orphan done failed interrupted
    reason: str = ""

    def progress(self) -> "Progress":
        return Progress.read(self)


@dataclasses.dataclass(frozen=True)
class Progress:
    step: int
    loss: float | None
    validation: float | None
    test: float | None
    rate: float | None  # steps per second
    seconds: float  # left

    @classmethod
    def read(cls, state: State) -> "Progress":
        last = runs.latest(state.folder) if state.state != "waiting" else {}
        train = last.get("train", {})
        step = max((record["step"] for record in last.values()), default=0)
        rate = train.get("steps_per_second") or None
        left = (state.job.steps - step) / rate if rate and state.state == "running" else 0.0
        accuracy = {split: last.get(split, {}).get("accuracy") for split in ("validation", "test")}
        return cls(step, train.get("loss"), accuracy["validation"], accuracy["test"], rate, left)


class Display:
    """Shows the states; `update` may be called as often as one likes."""

    def __init__(self, states: Collection[State], workers: int):
        self.states, self.workers = states, workers
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._drawn = 0.0
        self._said: dict[int, tuple[str, float, int]] = {}

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.live:
            self.live.stop()

    def update(self) -> None:
        if self.live is None:
            self._lines()
        elif time.monotonic() - self._drawn > REFRESH:
            self._drawn = time.monotonic()
            self.live.update(self._table(), refresh=True)

    def show(self) -> None:
        """Every job once, on a terminal or not."""
        width = max(self.console.width, 60 + max(len(state.job.name) for state in self.states))
        Console(highlight=False, width=width).print(self._table(all_of_them=True))

    def finish(self) -> None:
        """The last table, and the reasons of the jobs that did not end well."""
        if self.live:
            self.live.update(self._table(), refresh=True)
            self.live.stop()
        else:
            self._lines()
            self.console.print(self._summary())
        for state in self.states:
            if state.state == "failed":
                print(f"failed: {state.job.name}: {state.reason}")
                log = state.folder / "log.txt"
                print(f"    {log}: {runs.last_line(log) or '(empty)'}")
            elif state.state == "interrupted" and state.reason:
                print(f"interrupted: {state.reason}; the same command goes on from its checkpoint")
        if any(state.state == "failed" for state in self.states):
            print("run failed jobs again with --retry-failed")
        sys.stdout.flush()

    def _summary(self) -> Text:
        words = [WORDS.get(state.state, state.state) for state in self.states]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        return Text(f"sweep: {len(words)} jobs: {counts}")

    def _table(self, all_of_them: bool = False) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("job", "state", "step", "loss", "validation", "test", "steps/s", "left"):
            table.add_column(name, justify="left" if name in ("job", "state") else "right", no_wrap=True)
        left = 0.0
        rates = []
        shown = {state.job.number for state in self.states} if all_of_them else self._shown()
        for state in self.states:
            p = state.progress()
            left = max(left, p.seconds)
            rates += [p.rate] if p.rate else []
            if state.job.number not in shown:
                continue
            table.add_row(
                state.job.name,
                Text(WORDS.get(state.state, state.state), style=STYLES.get(state.state, "dim")),
                f"{p.step}/{state.job.steps}" if state.state != "waiting" else f"{state.job.steps}",
                _number(p.loss, "{:.3f}"),
                _number(p.validation, "{:.1%}"),
                _number(p.test, "{:.1%}"),
                _number(p.rate, "{:.2f}"),
                duration(p.seconds) if p.seconds else "",
            )
        waiting = sum(state.job.steps for state in self.states if state.state == "waiting")
        if rates:  # jobs that have not begun are taken to be as fast as those that have
            left += waiting * len(rates) / sum(rates) / self.workers
        ending = Text(f", about {duration(left)} left") if left else Text()
        return Group(table, self._summary() + ending)

    def _shown(self) -> set[int]:
        """As many jobs as the terminal has room for: those that need looking at, then those next to them in line."""
        room = max(4, self.console.height - 5)
        order = ("running", "orphan", "failed", "interrupted", "waiting", "done")
        ranked = sorted(self.states, key=lambda state: (order.index(state.state), state.job.number))
        return {state.job.number for state in ranked[:room]}

    def _lines(self) -> None:
        for state in self.states:
            number, now = state.job.number, time.monotonic()
            before, when, shown = self._said.get(number, ("waiting", 0.0, 0))
            if state.state == before and (state.state != "running" or now - when < PLAIN):
                continue
            p = state.progress()
            if state.state == before and p.step == shown:
                continue
            self._said[number] = (state.state, now, p.step)
            if state.state == "waiting" and before == "waiting":
                continue
            words = [f"[{number}/{len(self.states)}]", state.job.name, WORDS.get(state.state, state.state)]
            if state.state not in ("waiting", "orphan") and p.step:
                words.append(f"step {p.step}/{state.job.steps}")
                words += [f"loss {p.loss:.3f}"] if p.loss is not None else []
                words += [f"validation {p.validation:.1%}"] if p.validation is not None else []
                words += [f"test {p.test:.1%}"] if p.test is not None and state.state == "done" else []
                words += [f"{duration(p.seconds)} left"] if p.seconds else []
            print(*words, flush=True)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
