"""A table says what was measured and nothing else: rows, intervals, levels, missing seeds, warnings, links."""

import csv
import html.parser
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import tables
from experiments.formats import duration, scaled
from experiments.reporting import plots
from experiments.reporting.cells import read_table
from experiments.reporting.statistics import student_t, wilson
from experiments.reporting.text import protocol
from experiments.runs import RunError, last_line, latest, read_run, read_runs
from tests.experiments import fake_runs


@pytest.fixture
def root(tmp_path):
    """Two finished seeds of softmax, one of linear; pooling failed at seed 0 and goes on at seed 1."""
    fake_runs.write(tmp_path, "softmax", "aaaaaaaaaaaa", 0, 0.40, params=210_000)
    fake_runs.write(tmp_path, "softmax", "aaaaaaaaaaaa", 1, 0.44, params=210_000)
    fake_runs.write(tmp_path / "deeper", "linear", "bbbbbbbbbbbb", 0, 0.18, name="x")
    fake_runs.write(tmp_path, "pooling", "cccccccccccc", 0, status="failed")
    fake_runs.write(tmp_path, "pooling", "cccccccccccc", 1, status="unfinished")
    return tmp_path


def test_intervals_agree_with_tables_and_references():
    """t(0.975, 2) = 4.302653; Wilson's interval of 10 in 100 is (0.0552, 0.1744) [Newcombe 1998, method 3]."""
    low, high = student_t([0.1, 0.2, 0.3])
    assert (low, high) == pytest.approx((0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5), abs=1e-7)
    assert wilson(0.1, 100) == pytest.approx((0.0552, 0.1744), abs=5e-5)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        student_t([0.4])


def test_cells(root):
    softmax, linear, pooling = read_table(root, "listops").cells
    assert (softmax.label, softmax.mean, softmax.method) == ("softmax", pytest.approx(0.42), "t, 2 seeds")
    assert softmax.interval == pytest.approx(student_t([0.40, 0.44]))
    assert (linear.method, linear.verdict) == ("Wilson, 2000 examples", "not distinct")
    assert linear.interval == pytest.approx(wilson(0.18, 2000))
    assert softmax.verdict == "not distinct", "two seeds say little"
    assert (pooling.mean, pooling.seeds("failed"), pooling.seeds("unfinished")) == (None, [0], [1])
    assert softmax.curve()[-1][0] == 400


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.21, "above"), (0.18, "not distinct"), (0.14, "below")])
def test_verdict_needs_the_whole_interval_on_one_side(tmp_path, accuracy, verdict):
    fake_runs.write(tmp_path, "a", "a" * 12, accuracy=accuracy)
    assert read_table(tmp_path, "listops").cells[0].verdict == verdict


def test_files(root, capsys):
    assert tables.main(["listops", f"--runs={root}"]) == 0
    out = root / "tables" / "listops"
    printed = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in printed
    assert "majority class 17.2 %, chance 10.0 %" in printed
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["label"] for row in rows] == ["softmax", "linear", "pooling"]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.42)
    assert rows[0]["accuracies"] == "0.4 0.44"
    assert rows[2] | {"accuracy": "", "seeds_failed": "0", "seeds_unfinished": "1"} == rows[2]
    for row in rows:
        assert all((out / path / "config.json").exists() for path in row["runs"].split())
    text = (out / "table.md").read_text()
    assert "max_length 128 (LRA: 2,000)" in text
    assert "[0](../../softmax-s0) [1](../../softmax-s1)" in text
    assert (out / "table.tex").read_text().count(r"\\ %") == 3


def test_same_bytes_when_rebuilt(root):
    """In another process too, whatever its hash seed."""
    tables.main(["listops", f"--runs={root}"])
    files = sorted((root / "tables" / "listops").iterdir())
    before = [file.read_bytes() for file in files]
    command = [sys.executable, "-m", "experiments.tables", "listops", f"--runs={root}"]
    assert subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2]).returncode == 0
    assert [file.read_bytes() for file in files] == before
    assert [file.name for file in files] == ["report.html", "table.csv", "table.md", "table.tex"]


class Page(html.parser.HTMLParser):
    """Checks nesting, collects ids, links and everything that a browser would fetch."""

    VOID = ("meta", "br", "link", "img", "use", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.fetched = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.fetched += [found[key] for key in ("src", "srcset") if key in found] + [tag] * (tag in ("link", "script"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_report_is_one_well_formed_page_whose_links_lead_somewhere(root):
    tables.main(["listops", f"--runs={root}"])
    out = root / "tables" / "listops"
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert len(set(page.ids)) == len(page.ids)
    assert "@import" not in text
    assert "font-face" not in text
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (out / link).exists(), link
    assert sum(link.startswith("../") for link in page.links) == 5, "every run"
    assert text.count("<svg") - text.count('aria-hidden="true"') == 3, "three plots"
    assert "loss is nan at step 200" in text


def test_plots_take_their_colours_from_the_page(root):
    cells = read_table(root, "listops").cells
    for svg in (plots.accuracy_over("steps", cells), plots.accuracy_against_parameters(cells)):
        assert "var(--s" in svg
        assert "#a000" not in svg
        assert "#b000" not in svg
        assert "majority class 17.2 %" in svg


def test_labels_keep_apart_and_inside():
    for wanted in ([0, 1, 2, 50], [97, 98, 99, 100], [5, 5, 5, 5, 5, 5], [0, 40, 41, 100]):
        places = plots.spread(wanted, 13, 0, 100)
        assert all(b - a >= 13 - 1e-9 for a, b in itertools.pairwise(places))
        assert 0 <= places[0] <= places[-1] <= 100
    assert plots.spread([10, 50], 13, 0, 100) == [10, 50]


def test_labels_that_repeat_say_what_differs(tmp_path):
    fake_runs.write(tmp_path, "linear", "a" * 12, 0, 0.3, name="x", lr=1e-3)
    fake_runs.write(tmp_path, "linear", "b" * 12, 0, 0.4, name="y", lr=3e-3)
    assert [cell.label for cell in read_table(tmp_path, "listops").cells] == ["linear, lr=0.003", "linear, lr=0.001"]


def test_warnings(tmp_path):
    fake_runs.write(tmp_path, "a", "a" * 12, 0, 0.3, content="one")
    fake_runs.write(tmp_path, "b", "b" * 12, 0, 0.3, content="two", steps=800, task={"max_length": 256},
                    environment={"device": "Other", "commit": "f" * 40, "dirty": True})  # fmt: skip
    text = "\n".join(read_table(tmp_path, "listops").warnings)
    for part in ("mixed data", "train.steps is 400, 800", "task.max_length is 128, 256", "Example CPU (2 cores), Other",
                 "mixed commits", "uncommitted changes"):  # fmt: skip
        assert part in text


def test_a_seed_run_twice_counts_once(tmp_path):
    fake_runs.write(tmp_path, "a", "a" * 12, 0, 0.3, name="first")
    fake_runs.write(tmp_path, "a", "a" * 12, 0, 0.5, name="second", param_hash="other")
    table = read_table(tmp_path, "listops")
    assert (len(table.cells[0].done), table.cells[0].mean) == (1, 0.3)
    assert table.warnings == ["a: seed 0 was run twice, with other parameters: first counts, second does not"]


def test_lra_setting_needs_no_apology(tmp_path):
    fake_runs.write(tmp_path, "a", "a" * 12, task={"max_length": 2000, "train_examples": 96000})
    assert protocol(read_table(tmp_path, "listops")) == "The data is at Long Range Arena's setting."


def test_what_is_not_lras_does_not_say_it_is(tmp_path):
    """And what the task says of its data stands first among the warnings."""
    folder = fake_runs.write(tmp_path, "a", "a" * 12, task={"name": "cifar10", "copy": "JPEG-75"})
    summary = json.loads((folder / "summary.json").read_text())
    summary["task"]["note"] = "JPEG-75, not official CIFAR-10"
    fake_runs.save(folder / "summary.json", summary)
    table = read_table(tmp_path, "cifar10")
    assert protocol(table) == "Not a task of Long Range Arena's."
    assert table.warnings == ["JPEG-75, not official CIFAR-10"]
    assert tables.main(["cifar10", f"--runs={tmp_path}"]) == 0
    for file in ("table.md", "table.tex", "report.html"):
        assert "JPEG-75, not official CIFAR-10" in (tmp_path / "tables" / "cifar10" / file).read_text()
    fake_runs.write(tmp_path / "b", "b", "b" * 12, task={"name": "imdb", "level": "bytes", "protocol": "sound"})
    assert "protocol sound (LRA: release)" in protocol(read_table(tmp_path / "b", "imdb"))


def test_mistakes_are_one_line(root, capsys):
    assert tables.main(["text", f"--runs={root}"]) == 2
    assert capsys.readouterr().err == f"no runs of task 'text' below {root}; the runs there are of listops\n"
    assert tables.main(["text", f"--runs={root / 'none'}"]) == 2
    assert capsys.readouterr().err == f"{root / 'none'}: no such folder\n"
    (root / "softmax-s0" / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:1: damaged"):
        read_runs(root)


def test_torn_last_line_is_an_unfinished_run(root):
    run = read_run(root / "pooling-s1")
    assert run.status == "unfinished"
    assert run.curve("validation")[-1]["step"] == 200
    assert latest(run.path)["train"]["step"] == 200
    assert latest(root) == {}
    (root / "log.txt").write_text("first\nbar 1\rbar 2\n\n")
    assert last_line(root / "log.txt") == "bar 2"


def test_escapes(tmp_path):
    fake_runs.write(tmp_path, "<b>&_%|", "a" * 12, name="run")
    assert tables.main(["listops", f"--runs={tmp_path}"]) == 0
    out = tmp_path / "tables" / "listops"
    assert "<b>&_" not in (out / "report.html").read_text()
    assert r"<b>\&\_\%|" in (out / "table.tex").read_text()
    assert r"<b>&_%\|" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (950, "950"), (201_234, "201 K"), (999_600, "1 M"), (2.5e12, "2.5 T")]
)
def test_scaled(value, text):
    assert scaled(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (90, "1 min 30 s"), (7500, "2 h 05 min")]
)
def test_duration(value, text):
    assert duration(value) == text
