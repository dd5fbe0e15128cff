"""The report of a table: one HTML page that needs nothing beside it, readable in light and dark, narrow and wide."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from experiments.formats import duration, number, optional, percent, scaled
from experiments.reporting import plots
from experiments.reporting.cells import Cell, Table, commit, distinct
from experiments.reporting.text import bounds, link, protocol, seeds
from experiments.runs import Run, flatten

TITLES = {"listops": "ListOps", "text": "Text", "retrieval": "Retrieval", "image": "Image", "pathfinder": "Pathfinder"}
FOREST = 190.0  # width of the interval column, in pixels


def page(table: Table, out: Path) -> str:
    """The whole page. out is where it will lie: links to run folders are relative to it."""
    title = TITLES.get(table.task, table.task)
    style = (files("experiments.reporting") / "report.css").read_text(encoding="utf-8")
    captions = [
        ("Accuracy over steps", "validation, mean of the finished seeds" + _band(table), "over-steps"),
        ("Accuracy over time", "validation, against the seconds spent in training steps", "over-seconds"),
        ("Accuracy against parameters", "test, with 95 % interval; equal sizes stand side by side", "parameters"),
    ]
    drawn = [
        plots.accuracy_over("steps", table.cells),
        plots.accuracy_over("seconds", table.cells),
        plots.accuracy_against_parameters(table.cells),
    ]
    figures = [
        f'<figure class="card" role="img" aria-label="{escape(name)}: {escape(what)}"><figcaption>{escape(name)}'
        f"<span>{escape(what)}</span></figcaption>{svg}</figure>"
        for (name, what, _), svg in zip(captions, drawn, strict=True)
    ]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}: {len(table.cells)} architectures</title><style>{style}</style></head><body><main>",
        _head(table, title),
        _grid(table),
        f'<h2>Curves and costs</h2><div class="plots">{"".join(figures)}{_time(table)}</div>',
        "<h2>Runs behind each row</h2>",
        *(_cell(table, cell, out) for cell in table.cells),
        _foot(table),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _band(table: Table) -> str:
    return "; the band spans the seeds" if any(len(cell.done) > 1 for cell in table.cells) else ""


def _head(table: Table, title: str) -> str:
    done = [cell for cell in table.cells if cell.done]
    runs = [run for cell in table.cells for run in cell.runs]
    shared = [
        (key.rpartition(".")[2].replace("_", " "), number(v)) for key, v in table.settings.items() if v is not None
    ]
    shared.append(("device", "; ".join(distinct(run.environment.get("device") or "unknown" for run in runs))))
    shared.append(("commit", "; ".join(distinct(commit(run) for run in runs))))
    facts = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in shared)
    notes = (
        ["<strong>{}:</strong>{}.".format(*map(escape, protocol(table).rstrip(".").split(":", 1)))]
        if table.departures
        else []
    )
    notes += [f"<strong>{escape(first)}</strong>{escape(rest)}" for first, rest in map(_split, table.warnings)]
    return "".join(
        [
            f'<p class="over">Archloom · {len(table.cells)} architectures, {len(runs)} runs</p>',
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{_verdict(done)}</p><dl class="facts">{facts}</dl>',
            *(f'<p class="note">{note}</p>' for note in notes),
        ]
    )


def _split(warning: str) -> tuple[str, str]:
    first, colon, rest = warning.partition(":")
    return first[:1].upper() + first[1:] + colon, rest + "."


def _verdict(done: Sequence[Cell]) -> str:
    """What the table says, in two sentences that hold whatever the numbers are."""
    if not done:
        return "No run has finished yet."
    above = sum(cell.verdict == "above" for cell in done)
    best = done[0]
    text = f"{escape(best.label)} has the highest test accuracy, {percent(best.mean)} (95 % interval {bounds(best)}). "
    rivals = [cell for cell in done[1:] if cell.interval and best.interval and cell.interval[1] >= best.interval[0]]
    if rivals:
        names = ", ".join(escape(cell.label) for cell in rivals)
        text += f"Its interval overlaps with that of {names}. "
    levels = distinct(cell.majority for cell in done)
    level = f" of {percent(levels[0])}" if len(levels) == 1 else ""
    return text + f"{above} of {len(done)} intervals lie above the majority-class level{level}."


def _grid(table: Table) -> str:
    low, high = _range(table.cells)
    levels = sorted({cell.majority for cell in table.cells if cell.majority is not None})
    rows = []
    for cell in table.cells:
        color = f"var(--s{plots.series(table.cells, cell) % len(plots.SERIES)})"
        missing = cell.seeds("failed"), cell.seeds("unfinished")
        lost = [f"{len(which)} {word}" for which, word in zip(missing, ("failed", "unfinished")) if which]
        verdict = cell.verdict or "no result"
        seconds = cell.train_seconds
        rows.append(
            f'<tr><td><span class="dot" style="background:{color}"></span>'
            f'<a class="name" href="#{cell.anchor}">{escape(cell.label)}</a>'
            f'<span class="small mono">{cell.hash}</span></td>'
            f'<td class="n"><span class="big">{percent(cell.mean)}</span>'
            f'<span class="small">{escape(bounds(cell))}</span></td>'
            f'<td class="forest">{_interval(cell, color, low, high, levels)}</td>'
            f'<td><span class="mark {verdict.split()[0]}">{verdict}</span></td>'
            f'<td class="n">{len(cell.done)}<span class="small">{", ".join(lost)}</span></td>'
            f'<td class="n" title="{optional(number, cell.params)}">{_size(cell.params)}</td>'
            f'<td class="n">{scaled(cell.flops)}<span class="small">{scaled(cell.train_flops)}</span></td>'
            f'<td class="n">{optional("{:.2f}".format, cell.steps_per_second)}</td>'
            f'<td class="n">{optional(duration, seconds)}</td></tr>'
        )
    majority = ", ".join(percent(level) for level in levels) or "unknown"
    chances = ", ".join(percent(c) for c in distinct(cell.chance for cell in table.cells if cell.done)) or "unknown"
    return (
        '<div class="card scroll"><table><thead><tr><th>architecture</th>'
        '<th class="n">test accuracy<br>95 % interval</th>'
        f'<th class="forest">{_axis(low, high)}</th>'
        f'<th>against majority<br>class, {majority}</th><th class="n">seeds</th><th class="n">parameters</th>'
        '<th class="n">FLOPs/example<br>forward, train</th><th class="n">steps/s</th><th class="n">training</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="small">Dashed: the majority-class level, {majority}; chance is {chances}. {_methods(table)}</p>'
    )


def _size(params: int | None) -> str:
    return scaled(params) if params and params >= 10**6 else optional(number, params)


def _methods(table: Table) -> str:
    several = any(len(cell.done) > 1 for cell in table.cells)
    single = any(len(cell.done) == 1 for cell in table.cells)
    texts = ["Intervals from two seeds or more are Student's t over seeds."] if several else []
    if single:
        texts.append("Intervals from one seed are Wilson's over test examples: they do not cover the choice of seed.")
    return " ".join(texts)


def _range(cells: Sequence[Cell]) -> tuple[float, float]:
    values = [value for cell in cells if cell.interval for value in (*cell.interval, cell.majority or 0.0)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _interval(cell: Cell, color: str, low: float, high: float, levels: Sequence[float]) -> str:
    def place(value: float) -> str:
        return f"{FOREST * (value - low) / (high - low):.1f}"

    lines = "".join(
        f'<path d="M{place(level)} -10V44" stroke="var(--faint)" stroke-dasharray="4 3" fill="none"/>'
        for level in levels
    )
    if cell.interval is not None and cell.mean is not None:
        a, b = map(place, cell.interval)
        lines += (
            f'<path d="M{a} 17H{b}M{a} 12V22M{b} 12V22" stroke="{color}" stroke-width="2" fill="none"/>'
            f'<circle cx="{place(cell.mean)}" cy="17" r="4.5" fill="{color}"/>'
        )
    return f'<svg width="{FOREST:.0f}" height="34" aria-hidden="true">{lines}</svg>'


def _axis(low: float, high: float) -> str:
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 5 or step == 0.5)
    inner = 16 * (high - low) / FOREST  # half a tick's text
    ticks = [n * step for n in range(int(low / step), int(high / step) + 2) if low + inner <= n * step <= high - inner]
    texts = "".join(
        f'<text x="{FOREST * (tick - low) / (high - low):.1f}" y="12" text-anchor="middle" fill="var(--faint)"'
        f' font-size="11">{100 * tick:.0f} %</text>'
        for tick in ticks
    )
    return f'<svg width="{FOREST:.0f}" height="16" aria-hidden="true">{texts}</svg>'


def _cell(table: Table, cell: Cell, out: Path) -> str:
    color = f"var(--s{plots.series(table.cells, cell) % len(plots.SERIES)})"
    rows = "".join(_run(cell, run, out) for run in cell.runs)
    config = json.dumps(cell.config, indent=2, sort_keys=True)
    flat = [flatten(other.config) for other in table.cells]
    mine = flatten(cell.config)
    paths = sorted(set().union(*flat) - {"seed"})
    differ = [path for path in paths if len({repr(other.get(path)) for other in flat}) > 1 and path in mine]
    own = "\n".join(f"{path} = {json.dumps(mine[path])}" for path in differ)
    return (
        f'<section class="card run" id="{cell.anchor}"><header><h3><span class="dot" style="background:{color}"></span>'
        f"{escape(cell.label)}</h3><code>config {cell.hash}</code><code>{escape(cell.runs[0].source)}</code></header>"
        '<div class="inner"><table><thead><tr><th>seed</th><th>status</th><th class="n">test</th>'
        '<th class="n">best validation</th><th class="n">test there</th>'
        '<th class="n">steps</th><th class="n">steps/s</th><th class="n">total</th>'
        "<th>device</th><th>commit</th><th>parameters (SHA-256)</th><th>run folder</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{_seconds(cell)}"
        + (
            f"<details><summary>Where it differs from the other rows</summary><pre>{escape(own)}</pre></details>"
            if own
            else ""
        )
        + f"<details><summary>Resolved config</summary><pre>{escape(config)}</pre></details></section>"
    )


def _run(cell: Cell, run: Run, out: Path) -> str:
    s = run.summary or {}
    test, best = (s.get("final") or {}).get("test") or {}, s.get("best") or {}
    last = max((record["step"] for record in run.metrics), default=0)
    status = run.status if run in cell.done or run.status != "done" else "repeated"
    folder = link(run.path, out)
    values = (
        ("n", percent(test.get("accuracy"))),
        ("n", f"{percent(best.get('accuracy'))} at {number(best['step'])}" if best else ""),
        ("n", percent((best.get("test") or {}).get("accuracy"))),
        ("n", number(s.get("steps") or last)),
        ("n", optional("{:.2f}".format, s.get("steps_per_second"))),
        ("n", optional(duration, (s.get("seconds") or {}).get("total"))),
        ("", run.environment.get("device") or "unknown"),
        ("mono", commit(run)),
        ("mono", str(s.get("param_hash") or "")[:12]),
    )
    reason = f'<span class="small">{escape(run.reason)}</span>' if run.reason else ""
    cells = "".join(f'<td class="{kind}">{escape(text)}</td>' for kind, text in values)
    return (
        f"<tr><td>{run.seed}</td><td>{status}{reason}</td>{cells}"
        f'<td><a class="mono" href="{escape(folder)}/">{escape(run.path.name)}</a></td></tr>'
    )


def _time(table: Table) -> str:
    """Where the seconds went: a bar a row, of the ledgers' events per finished run, on one scale."""
    spent = [_spent(cell) for cell in table.cells]
    longest = max((sum(seconds.values()) for seconds in spent), default=0.0)
    if not longest:
        return ""
    total = {event: sum(seconds.get(event, 0.0) for seconds in spent) for seconds in spent for event in seconds}
    events = sorted(total, key=lambda event: (-total[event], event))
    shade = {event: f"var(--t{min(n, 5)})" for n, event in enumerate(events)}
    rows = "".join(
        f'<div class="time"><span>{escape(cell.label)}</span><span>{duration(sum(seconds.values()))}</span>'
        + '<div class="bar">'
        + "".join(
            f'<span style="width:{100 * seconds[event] / longest:.2f}%;background:{shade[event]}"></span>'
            for event in events
            if event in seconds
        )
        + "</div></div>"
        for cell, seconds in zip(table.cells, spent, strict=True)
        if seconds
    )
    names = "".join(f'<span><span class="dot" style="background:{shade[e]}"></span>{escape(e)}</span>' for e in events)
    return (
        '<figure class="card"><figcaption>Where the time went<span>seconds of a run, mean over its seeds, from the '
        f'ledgers</span></figcaption>{rows}<div class="legend">{names}</div></figure>'
    )


def _spent(cell: Cell) -> dict[str, float]:
    """Mean seconds a run by event, over the finished runs, or over all where none has finished."""
    runs = cell.done or cell.runs
    total: dict[str, float] = {}
    for run in runs:
        for event, seconds in run.seconds().items():
            total[event] = total.get(event, 0.0) + seconds / len(runs)
    return total


def _seconds(cell: Cell) -> str:
    texts = (f"{escape(event)} {seconds:.1f} s" for event, seconds in _spent(cell).items())
    return f'<p class="small">Seconds a run: {", ".join(texts)}</p>' if _spent(cell) else ""


def _foot(table: Table) -> str:
    lost = [
        f"{escape(c.label)}: seeds {seeds(c.seeds('failed', 'unfinished'))}"
        for c in table.cells
        if c.seeds("failed", "unfinished")
    ]
    text = f"Left out of every mean: {'; '.join(lost)}. " if lost else ""
    return (
        f"<footer><p>{text}Test accuracy is that of the last step; that of the best validation step is beside it "
        "in each run. FLOPs count a multiply and an add as two, forward of one example and a whole training step "
        "per example. Seeds are of initialisation and data order; the examples are the same in all. Made from the run "
        f"folders by <code>python -m experiments.tables {escape(table.task)} --runs=DIR</code>, which gives the same "
        'bytes each time; the numbers are in <a href="table.csv">table.csv</a>, also as '
        '<a href="table.md">Markdown</a> and <a href="table.tex">LaTeX</a>.</p></footer>'
    )
