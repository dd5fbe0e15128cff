"""experiments.latency: what it measures is the model of the config, and both sides are told apart."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from arch import accounting
from arch.registry import TASKS
from arch.spec import ImageSpec, InputSpec
from experiments import cli, config, environment, forward, latency, turns

CONFIG = """
from configs import parts

def get_config(arg="deep"):
    config = parts.base(task="listops", max_length=64, batch_size=4, steps=10)
    config.model = parts.metaformer(
        width=16, depth=2, mixer={"kind": "softmax", "num_heads": 2}, channel={"hidden": 32}, head={"hidden": 8}
    )
    if arg == "wide":
        config.model = parts.wide(config.model)
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sizes.py"
    path.write_text(CONFIG)
    return path


def test_forward_is_the_model_of_the_config(file):
    resolved = config.configure(f"{file}:wide")
    program = forward.Forward(resolved, batch=3, length=24)
    model, spec = (
        config.plain(resolved)["model"],
        InputSpec(TASKS.build(config.plain(resolved["task"])).spec.vocab_size, 10, 24),
    )
    facts = program.facts()
    assert facts["params"] == accounting.count_params(model, spec)
    assert facts["flops"] == pytest.approx(3 * accounting.forward_flops(model, spec), rel=1e-2)  # one for positions
    assert facts["compiled_bytes"]["total"] > 4 * facts["params"]
    logits = program()
    assert logits.shape == (3, 10)
    assert np.isfinite(logits).all()
    assert program.inputs.shape == (3, 24)
    assert program.inputs.min() > 0  # 0 is padding
    mixer, projections, channel = (program.parts()[name]() for name in ("mixer", "projections", "channel"))
    assert [y.shape for y in mixer] == [y.shape for y in channel] == [(3, 25, 16)]  # a CLS token before 24
    assert sorted(y.shape for y in projections) == [(3, 25, 16), (3, 25, 96)]  # out and qkv: 4 heads of 8


def test_no_parts_where_the_last_layer_computes_one_token(file):
    resolved = config.configure(f"{file}:deep", {"model.read": "pooled"})
    assert forward.Forward(resolved, batch=1, length=8).parts() == {}


def test_lengths_are_of_token_inputs():
    assert forward.of_length(InputSpec(5, 2, 10, pair=True), 7) == InputSpec(5, 2, 7, pair=True)
    with pytest.raises(ValueError, match="images"):
        forward.of_length(ImageSpec(8, 8, 3, 10), 7)
    assert forward.random_inputs(ImageSpec(4, 6, 3, 10), 2).shape == (2, 4, 6, 3)


def test_the_command(file, tmp_path, capsys):
    record = tmp_path / "records" / "latency.jsonl"
    words = [f"--config={file}:deep", f"--against={file}:wide", "--batch=2", "--lengths=24", "--rounds=2"]
    assert latency.main([*words, "--seconds=0.02", "--threads=1", f"--record={record}"]) == 0
    (line,) = map(json.loads, record.read_text().splitlines())
    printed = capsys.readouterr().out
    assert "deep" in printed
    assert "ms of mixing" in printed
    assert (line["batch"], line["length"], line["read"], line["rounds"]) == (2, 24, None, 2)
    for side in ("deep", "wide"):
        middle, low, high = line[side]["milliseconds"]
        assert 0 < low <= middle <= high
        assert line[side]["peak_bytes"] > 2**26  # a Python process with jax
        assert set(line[side]["parts"]) == {"projections", "mixing", "channel", "rest"}
        assert line["versions"][side]["device"] == environment.device()
    assert line["ratio"]["params"] == round(line["deep"]["params"] / line["wide"]["params"], 3) > 1.2
    assert line["ratio"]["flops"] > 1.2
    assert line["command"][0] == "python"
    assert line["commit"] == environment.source_version()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--against: missing"),
        (["--against={}:wide", "--batch=0"], "--batch: '0' is not a list"),
        (["--against={}:wide", "--lengths=10,x"], "--lengths: '10,x' is not a list"),
        (["--against={}:wide", "--rounds=0"], "--rounds: 0 is not above 0"),
        (["--against={}:wide", "--read=some"], "config.model.read"),
        (["--against={}:wide", "--config.model.head.pooling=mean", "--read=pooled"], "config.model.read: pooled needs"),
    ],
)
def test_mistakes(file, capsys, words, message):
    assert latency.main([f"--config={file}:deep", *(word.format(file) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_labels():
    assert latency.labels("a.py:deep", "a.py:wide") == ["deep", "wide"]
    assert latency.labels("x/a.py:wide", "x/b.py:wide") == ["a", "b"]
    assert latency.labels("x/a.py", "y/a.py") == ["config", "against"]


def test_parts_add_up_to_the_whole():
    rounds = [{"mixer": 0.5, "projections": 0.2, "channel": 0.1}, {"mixer": 0.5, "projections": 0.2, "channel": 0.3}]
    parts = latency.shares(1.0, rounds)
    assert parts == {"projections": 200.0, "mixing": 300.0, "channel": 200.0, "rest": 300.0}


def test_peak_from_now_on():
    wide = jnp.zeros((64, 2**20))  # 256 MiB
    wide.block_until_ready()
    before = environment.peak_bytes()
    wide.delete()
    if not environment.reset_peak():
        pytest.skip("the system does not let a process reset its peak")
    assert environment.peak_bytes() < before - 2**27


def test_a_side_that_dies_is_named():
    with pytest.raises(SystemExit, match="the left process ended with code 3"):
        turns.Side("left", [__import__("sys").executable, "-c", "raise SystemExit(3)"], 1)


def test_cli_wraps_main():
    assert cli.command(lambda argv: None)([]) == 0
