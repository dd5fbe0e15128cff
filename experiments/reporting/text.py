"""A table as Markdown, LaTeX and CSV."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.formats import number, optional, percent, scaled
from experiments.reporting.cells import LRA, Cell, Table

HEADINGS = (
    "architecture", "test accuracy", "95 % interval", "interval of", "majority", "against majority", "chance",
    "seeds", "failed", "unfinished", "parameters", "FLOPs/example", "train FLOPs/example", "steps/s", "train s",
    "device", "commit", "config hash",
)  # fmt: skip
NUMBERS = range(1, 15)  # columns set to the right, but for the words among them


def heading(table: Table) -> str:
    """What was measured, in one line, so that a short setting is not taken for LRA's."""
    settings = ", ".join(
        f"{key.rpartition('.')[2]} {number(value)}" for key, value in table.settings.items() if value is not None
    )
    return f"{table.task}: {settings}"


def protocol(table: Table) -> str:
    """Whether the data is LRA's."""
    if table.task not in LRA:
        return "Not a task of Long Range Arena's."
    if not table.departures:
        return "The data is at Long Range Arena's setting."
    return "Not Long Range Arena's setting, do not compare with its tables: " + "; ".join(table.departures) + "."


def words(cell: Cell) -> list[str]:
    """A row as text, under HEADINGS."""
    return [
        cell.label,
        percent(cell.mean),
        bounds(cell),
        cell.method,
        percent(cell.majority),
        cell.verdict,
        percent(cell.chance),
        str(len(cell.done)),
        seeds(cell.seeds("failed")),
        seeds(cell.seeds("unfinished")),
        optional(number, cell.params),
        scaled(cell.flops),
        scaled(cell.train_flops),
        optional("{:.2f}".format, cell.steps_per_second),
        optional("{:.0f}".format, cell.train_seconds),
        cell.device,
        cell.commit,
        cell.hash,
    ]


def bounds(cell: Cell) -> str:
    return "" if cell.interval is None else f"{percent(cell.interval[0], '')} to {percent(cell.interval[1])}"


def seeds(values: Sequence[int]) -> str:
    """How many, and which: 2 (0, 3)."""
    return f"{len(values)} ({', '.join(map(str, values))})" if values else "0"


def markdown(table: Table, out: Path) -> str:
    """The table with a link from each hash to the cell's place in the report, and from each seed to its run."""
    rows = []
    for cell in table.cells:
        texts = [text.replace("|", "\\|") for text in words(cell)]
        texts[-1] = f"[{cell.hash}](report.html#{cell.anchor})"
        links = " ".join(f"[{run.seed}]({link(run.path, out)})" for run in cell.runs)
        rows.append([*texts, links])
    align = ["---:" if n in NUMBERS else "---" for n in range(len(HEADINGS) + 1)]
    lines = [f"# {heading(table)}", "", protocol(table), ""]
    lines += ["| " + " | ".join(row) + " |" for row in ([*HEADINGS, "runs by seed"], align, *rows)]
    lines += ["", *(f"Warning: {text}." for text in table.warnings)]
    return "\n".join(lines).rstrip() + "\n"


def latex(table: Table) -> str:
    """A booktabs table of the columns a paper prints; hashes, commits and warnings as comments."""
    rows = [f"% {heading(table)}", f"% {protocol(table)}", *(f"% Warning: {text}" for text in table.warnings)]
    rows += [r"\begin{tabular}{lrrlrrrr}", r"\toprule"]
    names = (
        "Architecture",
        "Accuracy",
        "95 % interval",
        "Against majority",
        "Seeds",
        "Parameters",
        "FLOPs/example",
        "steps/s",
    )
    rows += [" & ".join(map(escape_latex, names)) + r" \\", r"\midrule"]
    for cell in table.cells:
        lost = len(cell.seeds("failed", "unfinished"))
        done = f"{len(cell.done)} of {len(cell.done) + lost}" if lost else str(len(cell.done))
        texts = [cell.label, percent(cell.mean), bounds(cell), cell.verdict, done]
        texts += [scaled(cell.params), scaled(cell.flops), optional("{:.2f}".format, cell.steps_per_second)]
        rows.append(" & ".join(map(escape_latex, texts)) + rf" \\ % {cell.hash} {cell.commit}")
    rows.append(r"\midrule")
    levels = sorted({(cell.majority, cell.chance) for cell in table.cells if cell.done})
    for majority, chance in levels:
        text = f"majority class {percent(majority)}, chance {percent(chance)}"
        rows.append(rf"\multicolumn{{8}}{{l}}{{{escape_latex(text)}}} \\")
    return "\n".join([*rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def comma_separated(table: Table, out: Path) -> str:
    """Numbers as they were measured, a row a cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [
        "task", "label", "config_hash", "accuracy", "low", "high", "interval", "majority", "against_majority", "chance",
        "seeds_done", "seeds_failed", "seeds_unfinished", "accuracies", "params", "flops", "train_flops",
        "steps_per_second", "train_seconds", "device", "commit", "runs",
    ]  # fmt: skip
    writer.writerow(names)
    for cell in table.cells:
        low, high = cell.interval or (None, None)
        writer.writerow([
            table.task, cell.label, cell.hash, plain(cell.mean), plain(low), plain(high), cell.method,
            plain(cell.majority), cell.verdict, plain(cell.chance), " ".join(str(run.seed) for run in cell.done),
            " ".join(map(str, cell.seeds("failed"))), " ".join(map(str, cell.seeds("unfinished"))),
            " ".join(map(plain, cell.accuracies)), plain(cell.params), plain(cell.flops), plain(cell.train_flops),
            plain(cell.steps_per_second), plain(cell.train_seconds), cell.device, cell.commit,
            " ".join(link(run.path, out) for run in cell.runs),
        ])  # fmt: skip
    return file.getvalue()


def plain(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def link(path: Path, out: Path) -> str:
    """From a page in out to a run folder."""
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
