"""Plans side by side."""

import json

import pytest

from experiments import plan

DEEP, WIDE = (f"configs/wide/imdb_bytes.py:softmax-{ratio}" for ratio in ("6x8", "1x48"))


def run(capsys, *argv):
    assert plan.main(list(argv)) == 0
    return capsys.readouterr().out


def closed_form(keys: int) -> float:
    """FLOPs of the products at 1000 bytes and a CLS token, deep by wide: six feed-forward blocks against one."""
    tokens, width, hidden = 1001, 512, 2048
    heads = 8 * tokens * width * width + 4 * tokens * keys * width  # of 8 heads, projections and scores
    channel = 4 * tokens * width * hidden
    return 6 * (heads + channel) / (6 * heads + channel)


def test_ratios_of_wide_attention(capsys):
    """2.1 times smaller; FLOPs fall by 1.72 at length 1000, by a little less with keys filled up to whole lines."""
    found = json.loads(run(capsys, f"--config={DEEP}", f"--against={WIDE}", "--json"))
    assert [row["source"] for row in found["plans"]] == [DEEP, WIDE]
    (ratios,) = found["ratios"]
    assert ratios["no embedding"] == pytest.approx(2.11, abs=0.005)
    assert closed_form(keys=1001) == pytest.approx(1.72, abs=0.005)
    assert ratios["FLOPs"] == pytest.approx(closed_form(keys=1024), rel=0.002)
    assert ratios["activations"] > 3
    one = json.loads(run(capsys, f"--config={WIDE}", "--json"))["account"]
    assert found["plans"][1]["parameters"] == one["params"]
    assert found["plans"][1]["no embedding"] == one["params"] - 257 * 512 - 512  # the CLS token too
    assert found["plans"][1]["train FLOPs"] == one["train_flops"]


def test_overrides_are_for_all(capsys):
    argv = [f"--config={DEEP}", f"--against={WIDE}", "--json", "--config.task.max_length=4000"]
    (ratios,) = json.loads(run(capsys, *argv))["ratios"]
    assert ratios["FLOPs"] == pytest.approx(1.31, abs=0.005)


def test_the_table(capsys):
    names = ["softmax", "wide", "linear"]
    argv = [f"--config=configs/quickstart.py:{names[0]}"]
    out = run(capsys, *argv, *(f"--against=configs/quickstart.py:{name}" for name in names[1:]))
    lines = out.splitlines()
    assert "no embedding" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == [f"configs/quickstart.py:{name}" for name in names]
    assert [line.count("x ") + line.endswith("x") for line in lines[6:]] == [5, 5]
    assert lines[1].split()[1:3] == ["138.89", "K"]


def test_a_wrong_name_is_one_line(capsys):
    assert plan.main([f"--config={DEEP}", "--against=configs/quickstart.py:softmx"]) == 2
    assert "did you mean 'softmax'" in capsys.readouterr().err
