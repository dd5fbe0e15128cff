"""The scaling command of FIT: what it proposes, counts and refuses; a training step at a tiny size."""

import importlib.util
import json

import numpy as np
import pytest

from experiments import fit_scaling

TINY = ("--width=64", "--latent_width=64", "--latents=2", "--pattern=(2)2(2)")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_propose(capsys):
    assert fit_scaling.main(["propose", "--grid=400,400"]) == 0
    assert "400 groups of 20x20, 16 latents each" in capsys.readouterr().out
    assert fit_scaling.main(["propose", "--length=160000"]) == 0
    assert fit_scaling.main(["propose"]) == 2
    assert fit_scaling.main(["propose", "--grid=4,x"]) == 2
    assert "--grid" in capsys.readouterr().err


def test_slope_is_the_exponent():
    rows = [{"tokens": n, "flops": 3.0 * n**1.25} for n in (1_000, 10_000, 40_000)]
    assert fit_scaling.slope(rows, "flops") == 1.25
    assert fit_scaling.slope(rows, "flops", 40_000) is None


def test_count_and_record(tmp_path):
    """More tokens cost more, and the scores grow as L^(4/3) or less; each line says how it was made."""
    file = tmp_path / "fit.jsonl"
    assert fit_scaling.main(["count", "--sides=256,512,1024", *TINY, f"--record={file}"]) == 0
    *rows, slopes = lines(file)
    assert [row["tokens"] for row in rows] == [256, 1024, 4096]
    assert 0.8 < slopes["flops"]["all"] < 4 / 3
    assert 1.1 < slopes["scores"]["all"] < 1.4
    assert all({"commit", "command", "device", "versions", "model"} <= row.keys() for row in rows)


def test_a_step_runs(tmp_path):
    file = tmp_path / "fit.jsonl"
    assert fit_scaling.main(["train", "--sides=64", "--steps=2", *TINY, f"--record={file}"]) == 0
    (row,) = lines(file)
    assert row["tokens"] == 16
    assert len(row["losses"]) == 2
    assert np.isfinite(row["losses"]).all()


def test_images_show_their_label():
    """The mean of each channel tells the label, of which all come."""
    seen = set()
    for index in range(40):
        batch = fit_scaling.image(64, index)
        bright = batch["inputs"].mean((0, 1, 2)) > 3 / 32  # half of a sixteenth of 3
        assert int(batch["label"][0]) == sum(1 << n for n in range(3) if bright[n])
        seen.add(int(batch["label"][0]))
    assert len(seen) == 8


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_chip_needs_the_compiler(capsys):
    assert fit_scaling.main(["chip"]) == 2
    assert "libtpu" in capsys.readouterr().err


def test_mistakes(capsys):
    assert fit_scaling.main(["count", "--sides=100"]) == 2
    assert fit_scaling.main(["count", "--sides=x"]) == 2
    assert "--sides" in capsys.readouterr().err
