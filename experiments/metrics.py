"""What a run writes while it runs: metrics.jsonl (the truth), ledger.jsonl (seconds), TensorBoard, progress."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.files import keep_lines, read_lines

log = logging.getLogger("archloom")


class JsonLines:
    """Appends objects to a file, one a line, each line in one write."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "a")  # noqa: SIM115  open as long as the run

    def write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Metrics:
    """metrics.jsonl and its TensorBoard copy. A step and split appear once, however often the run was interrupted.

    Lines past the step it resumes from are dropped, and test lines, which the end of the run writes.
    """

    def __init__(self, folder: Path, resumed: int = 0):
        path = folder / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= resumed and line["split"] != "test"]
        keep_lines(path, kept)
        self._lines = JsonLines(path)
        from tensorboardX import SummaryWriter  # a second of imports, not needed by those who only read

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1 if resumed else None)

    def write(self, step: int, split: str, **fields: Any) -> None:
        self._lines.write(step=step, split=split, **fields)
        for name, value in fields.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


class Ledger:
    """ledger.jsonl: seconds by event. Totals run over every attempt at the run."""

    def __init__(self, folder: Path):
        path = folder / "ledger.jsonl"
        lines = list(read_lines(path))
        keep_lines(path, lines)  # without a line cut off by a kill
        self.totals: dict[str, float] = {}
        for line in lines:
            self._add(line["event"], line.get("seconds", 0.0))
        self._lines = JsonLines(path)

    def _add(self, event: str, seconds: float) -> None:
        self.totals[event] = self.totals.get(event, 0.0) + seconds

    def write(self, event: str, step: int, seconds: float = 0.0, **fields: Any) -> None:
        self._add(event, seconds)
        self._lines.write(event=event, step=step, seconds=round(seconds, 6), **fields)

    @contextmanager
    def timed(self, event: str, step: int, **fields: Any) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.write(event, step, time.perf_counter() - start, **fields)

    def close(self) -> None:
        self._lines.close()


class Progress:
    """A live line in a terminal; elsewhere a plain line, at most one every `every` seconds."""

    def __init__(self, total: int, *, every: float = 5.0, stream: Any = None):
        self.total, self.every = total, every
        self._stream = stream or sys.stderr
        self._shown = float("-inf")
        self._bar: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("train", total=total, text="")
            self._bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, fields: Mapping[str, Any]) -> None:
        """fields: loss, accuracy if the objective has it, examples_per_second, steps_per_second."""
        finite = fields["loss"] is not None
        shown = [name for name in ("loss", "accuracy") if name in fields]
        text = "  ".join(f"{name} {fields[name]:.4f}" for name in shown) if finite else "loss is not finite"
        left = (self.total - step) / max(fields["steps_per_second"], 1e-9)
        text += f"  {fields['examples_per_second']:.0f} examples/s  ETA {clock(left)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._shown >= self.every or step == self.total:
            self.say(f"step {step}/{self.total}  {text}")
            self._shown = now

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """75 as 1:15, 3700 as 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Stopwatch:
    """Seconds of training, in stretches between pauses (evaluation, checkpoints); the wait for data is told apart."""

    def __init__(self, ledger: Ledger, total: float = 0.0):
        self._ledger, self._before = ledger, total
        self._began: float | None = None
        self._data, self._steps = 0.0, 0

    @property
    def total(self) -> float:
        """Training seconds so far, earlier attempts included."""
        return self._before + (time.perf_counter() - self._began if self._began is not None else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for one step's data; starts a stretch if none runs."""
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        yield
        self._data += time.perf_counter() - now
        self._steps += 1

    def pause(self, step: int) -> None:
        """Ends a stretch and books it."""
        if self._began is not None:
            seconds = time.perf_counter() - self._began
            self._ledger.write("data", step, self._data, steps=self._steps)
            self._ledger.write("train", step, seconds - self._data, steps=self._steps)
            self._before += seconds
            self._began, self._data, self._steps = None, 0.0, 0


class Window:
    """Means over the steps since the last line of the metrics. `state` is plain data that a checkpoint keeps."""

    def __init__(
        self, state: Mapping[str, Any] | None = None, means: tuple[str, ...] = ("loss", "accuracy", "grad_norm")
    ):
        self.means = means
        empty = {"steps": 0, "finite": 0, "seconds": 0.0, **dict.fromkeys(means, 0.0)}
        self.state: dict[str, Any] = {**empty, **(state or {})}  # seconds: the stopwatch's total when the window began

    def add(self, row: Mapping[str, float]) -> None:
        self.state["steps"] += 1
        if row["ok"]:
            self.state["finite"] += 1
            for name in self.means:
                self.state[name] += row[name]

    def line(self, row: Mapping[str, float], seconds: float, batch_size: int) -> dict[str, Any]:
        """The fields of one train line, and a new window. A mean over no finite step is None."""
        state, finite = self.state, self.state["finite"]
        rate = state["steps"] / max(seconds - state["seconds"], 1e-9)
        self.__init__({"seconds": seconds}, self.means)  # type: ignore[misc]
        return {
            **{name: state[name] / finite if finite else None for name in self.means},
            "learning_rate": row["learning_rate"],
            "seconds": round(seconds, 3),
            "steps_per_second": rate,
            "examples_per_second": rate * batch_size,
        }
