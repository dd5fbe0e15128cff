"""Makes the table of a task from saved runs: table.md, table.tex, table.csv and one self-contained report.html.

    python -m experiments.tables listops --runs=DIR [--out=DIR/tables/listops]

Reads only run folders. The same runs give the same bytes: nothing here asks for the time, and everything is sorted.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table as Screen

from experiments.cli import Parser, command
from experiments.formats import percent
from experiments.reporting import report
from experiments.reporting.cells import Table, read_table
from experiments.reporting.text import HEADINGS, NUMBERS, comma_separated, heading, latex, markdown, protocol, words


def write(table: Table, out: Path) -> Path:
    """Writes the four files; returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("table.md", markdown(table, out)),
        ("table.tex", latex(table)),
        ("table.csv", comma_separated(table, out)),
        ("report.html", report.page(table, out)),
    ):
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    return out / "report.html"


def show(table: Table) -> None:
    """The table on the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(f"[bold]{heading(table)}[/bold]")
    console.print(protocol(table), style="yellow" if table.departures else "")
    columns = (0, 1, 2, 5, 7, 10, 11, 13, 14)
    screen = Screen(box=None, pad_edge=False, header_style="dim")
    for n in columns:
        screen.add_column(HEADINGS[n], justify="right" if n in NUMBERS and n != 5 else "left")
    for cell in table.cells:
        texts = words(cell)
        missing = len(cell.seeds("failed", "unfinished"))
        texts[7] += f", {missing} missing" if missing else ""
        screen.add_row(*(texts[n] for n in columns))
    console.print(screen)
    for majority, chance in sorted({(cell.majority, cell.chance) for cell in table.cells if cell.done}):
        console.print(f"majority class {percent(majority)}, chance {percent(chance)}", style="dim")
    for text in table.warnings:
        console.print(f"warning: {text}", style="yellow", markup=False)


@command
def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", help="name of the task, as listops")
    parser.add_argument("--runs", required=True, type=Path, help="folder with run folders at any depth")
    parser.add_argument("--out", type=Path, help="where to write (default: RUNS/tables/TASK)")
    flags = parser.parse_args(argv)
    table = read_table(flags.runs, flags.task)
    page = write(table, flags.out or flags.runs / "tables" / flags.task)
    show(table)
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
