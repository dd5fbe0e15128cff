"""Golden text of every shipped config: its resolved options and its parameter table.

A change shows as a diff. If it is meant: python -m pytest tests/test_golden.py --update-golden, and read the diff.
"""

import json
from pathlib import Path

import pytest

from arch.accounting import account, parameter_table
from arch.registry import TASKS
from experiments import config, plan
from tests.experiments.shipped import SOURCES

GOLDEN = Path(__file__).parent / "golden"


def lines(tree, path=""):
    for key in sorted(tree):
        here = f"{path}.{key}" if path else key
        if isinstance(tree[key], dict):
            yield from lines(tree[key], here)
        else:
            yield f"{here} = {tree[key]!r}"


def text(source: str) -> str:
    tree = config.plain(config.configure(source))
    parts = parameter_table(tree["model"], TASKS.build(tree["task"]).spec)
    table = [f"{part.name:32}{part.copies:>4}{part.params:>14,}" for part in parts]
    table.append(f"{'total':32}{'':>4}{sum(part.params for part in parts):>14,}")
    return "\n".join([source, "", *lines(tree), "", *table, ""])


@pytest.mark.parametrize("source", SOURCES)
def test_golden(source: str, request: pytest.FixtureRequest) -> None:
    file = GOLDEN / (source.removeprefix("configs/").replace("/", "_").replace(".py:", "-") + ".txt")
    if request.config.getoption("--update-golden"):
        file.write_text(text(source))
    assert file.exists(), f"no {file.name}; make it with --update-golden"
    assert file.read_text() == text(source)


def test_no_stale_golden_files() -> None:
    names = {source.removeprefix("configs/").replace("/", "_").replace(".py:", "-") + ".txt" for source in SOURCES}
    assert {file.name for file in GOLDEN.iterdir()} == names


def test_quick_start_is_matched() -> None:
    """Linear and hybrid are within 1 % of softmax in parameters; wide has its heads: what the file says of itself."""
    counts, heads = {}, {}
    for name in ("softmax", "linear", "hybrid", "wide"):
        tree = config.plain(config.configure(f"configs/quickstart.py:{name}"))
        model = tree["model"]
        counts[name] = account(model, TASKS.build(tree["task"]).spec).params
        used = [model["layers"][i % len(model["layers"])] for i in range(model["depth"])]
        heads[name] = sum(model["parts"][part].get("num_heads", 0) for part in used)
    assert abs(counts["linear"] / counts["softmax"] - 1) < 0.01
    assert abs(counts["hybrid"] / counts["softmax"] - 1) < 0.01
    assert heads["wide"] == heads["softmax"] == 16
    assert plan.si(counts["softmax"]).endswith("K")


def test_options_added_later_leave_old_runs_their_names() -> None:
    """The hash of a record that was made before these options came; anything but what they were makes another."""
    source = "configs/synthetic/mqar.py:softmax"
    file = Path(__file__).parent.parent / "results" / "learning.jsonl"
    record = next(r for r in map(json.loads, file.read_text().splitlines()) if r["source"] == source)
    assert config.config_hash(config.configure(source)) == record["config_hash"]
    for changed in ({"model.loops": 2}, {"model.scan": True}, {"model.parts.mixer.heads_at_once": 2}):
        assert config.config_hash(config.configure(source, changed)) != record["config_hash"]
