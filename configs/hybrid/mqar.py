"""Hybrids on multi-query associative recall: the task and recipe of configs/synthetic/mqar.py, four layers.

Run: python -m experiments.train --config=configs/hybrid/mqar.py:delta_net-local --workdir=DIR
The argument names a hybrid of configs/hybrid/layers.py.
"""

from configs.hybrid import layers
from configs.synthetic import mqar, recipe

MIXERS = ("softmax", "local", "delta_net", "mamba", "hyena")
CHANNELS = {
    "mlp": {"kind": "mlp", "hidden": 128},
    "swiglu": {"kind": "swiglu", "hidden": 86},
    "moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 64},
}


def get_config(name: str = "delta_net-local"):
    config = mqar.get_config("softmax")
    sections = {**{mixer: recipe.part(mixer, causal=True) for mixer in MIXERS}, **CHANNELS}
    model = layers.hybrid(name, width=64, depth=4, sections=sections, channel="mlp")
    model.head, model.causal = config.model.head, True
    config.model = model
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in layers.HYBRIDS]
