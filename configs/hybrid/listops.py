"""Hybrids on short ListOps: the task and recipe of configs/synthetic/listops.py, four bidirectional layers.

Run: python -m experiments.train --config=configs/hybrid/listops.py:looped --workdir=DIR
The argument names a hybrid of configs/hybrid/layers.py; what has no bidirectional form runs in both directions.
"""

from configs.hybrid import layers, mqar
from configs.synthetic import listops, recipe


def get_config(name: str = "looped"):
    config = listops.get_config("softmax")
    sections = {**{mixer: recipe.part(mixer, causal=False) for mixer in mqar.MIXERS}, **mqar.CHANNELS}
    model = layers.hybrid(name, width=64, depth=4, sections=sections, channel="mlp")
    model.head = config.model.head
    config.model = model
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in ("looped", "hyena-softmax", "parallel", "experts", "samba")]
