"""Every mixer in a model: planned, priced and matched to a budget."""

import pytest

import arch.mixers  # noqa: F401
from arch import accounting
from arch.registry import MIXERS, TASKS
from configs import parts
from experiments import config, match
from experiments.config import ConfigError

WRAPPED = {"bidirectional": "bidirectional-linear", "chunks": "chunks-softmax", "gated": "gated-softmax"}

QUICK = ("softmax", "hedgehog", "delta_net", "mamba", "s5", "hyena", "synthesizer", "linformer", "bidirectional")


def experiment(name: str, causal: bool):
    made = parts.base(task="listops", max_length=64, batch_size=8, steps=10)
    mixer = parts.MIXERS[WRAPPED.get(name, name)]
    made.model = parts.metaformer(width=32, depth=2, mixer=mixer, head={"pooling": "mean"}, dropout=0.1)
    made.model.causal = causal
    return config.plain(config.resolve(made))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MIXERS.names())
def test_plan(name):
    tree = experiment(name, causal=MIXERS[name].modes == ("causal",))
    spec = TASKS.build(tree["task"]).spec
    found = accounting.account(tree["model"], spec)
    rows = [part for part in found.parts if part.name.startswith("mixer ")]
    assert (len(rows), rows[0].copies) == (1, 2)
    inner = WRAPPED.get(name, "").partition("-")[2]
    assert rows[0].name == f"mixer {name}" + (f" ({inner})" if inner else "")
    assert rows[0].flops > 0 or name == "identity"
    assert found.train_flops > 2 * found.flops > 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MIXERS.names()]
)
def test_match(name):
    tree = experiment(name, causal=MIXERS[name].modes == ("causal",))
    spec = TASKS.build(tree["task"]).spec
    target = 2.0 * accounting.count_params(tree["model"], spec)
    matched = match.match(tree["model"], spec, params=target)
    assert abs(matched.reached / target - 1) < 0.01
    assert accounting.count_params(matched.model, spec) == matched.reached


@pytest.mark.parametrize("name", [name for name in MIXERS.names() if MIXERS[name].modes == ("causal",)])
def test_causal_mixers_are_refused_in_a_bidirectional_model(name):
    with pytest.raises(ConfigError, match=r"parts.mixer.kind: .* no bidirectional form.*wrap it"):
        experiment(name, causal=False)
