"""The plan and its equal budgets."""

import json

import pytest

from arch.registry import TASKS
from arch.spec import InputSpec
from experiments import config, match, plan
from experiments.config import ConfigError


def run(capsys, *argv):
    assert plan.main(list(argv)) == 0
    return capsys.readouterr().out


def test_plan_prints_every_part_and_a_total(capsys):
    out = run(capsys, "--config=configs/quickstart.py:hybrid")
    for words in ("mixer pooling", "mixer softmax", "channel mixer mlp", "139,146", "optimizer state", "activations"):
        assert words in out


def test_bytes_follow_the_mesh(capsys):
    one = json.loads(run(capsys, "--config=configs/lra/listops.py:softmax", "--json"))
    eight = json.loads(
        run(capsys, "--config=configs/lra/listops.py:softmax", "--json", "--devices=8", "--config.mesh.fsdp=8")
    )
    assert one["bytes_per_device"]["parameters"] == 4 * one["account"]["params"]
    assert one["bytes_per_device"]["optimizer state"] == pytest.approx(8 * one["account"]["params"], rel=1e-3)
    assert eight["bytes_per_device"]["parameters"] < 0.2 * one["bytes_per_device"]["parameters"]
    assert eight["bytes_per_device"]["activations (estimate)"] == pytest.approx(
        one["bytes_per_device"]["activations (estimate)"] / 8, rel=1e-3
    )


@pytest.mark.parametrize("request_", ["params=0.4M", "params=60K", "flops=30M", "layers=2", "layers=8,params=0.2M"])
def test_match_reaches_the_budget(request_):
    base = config.configure("configs/quickstart.py:softmax")
    matched, found = plan.matched(base, request_)
    assert abs(found.reached / found.target - 1) <= 0.01
    tree = config.plain(matched)
    spec = TASKS.build(tree["task"]).spec
    assert match.BUDGETS[found.budget](tree["model"], spec) == found.reached
    again = config.configure("configs/quickstart.py:softmax", found.overrides)  # the printed flags say it all
    assert config.config_hash(again) == config.config_hash(matched)


def test_match_takes_another_configs_budget():
    base = config.configure("configs/quickstart.py:wide")
    _, found = plan.matched(base, "params=configs/quickstart.py:softmax")
    assert found.target == 138_890
    assert abs(found.reached / found.target - 1) <= 0.01


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("parms=1M", "did you mean 'params'"),
        ("params=", "has no value"),
        ("params=many", "neither a number"),
        ("params=-1", "not above 0"),
        ("params=1M,flops=1M", "two budgets"),
        ("layers=0", "positive"),
        ("params=100", "no width comes within 1 %"),
        ("params=1e15", "beyond"),
    ],
)
def test_match_refuses(request_, words):
    with pytest.raises(ConfigError, match=words) as caught:
        plan.matched(config.configure("configs/quickstart.py:softmax"), request_)
    assert caught.value.path == "--match"


def test_mesh_that_does_not_fill_is_refused():
    with pytest.raises(ConfigError, match="does not fill"):
        plan.make_plan("x", config.configure("configs/quickstart.py:softmax", {"mesh.fsdp": 3}), devices=8)


def test_match_says_what_it_cannot_solve():
    with pytest.raises(ConfigError, match="several widths"):
        match.match({"topology": "pyramid", "widths": (8, 16)}, InputSpec(vocab_size=3, num_classes=2, length=4))
