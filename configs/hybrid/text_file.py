"""Hybrids at the size of the 340M models of linear attention's papers, on the bytes of a text file of yours.

Plan: python -m experiments.plan --config=configs/hybrid/text_file.py:delta_net-local
24 layers of 1024, heads of 128, windows of 2048, SwiGLU; sequences of 8192 bytes. The argument names a hybrid of
configs/hybrid/layers.py. DeltaNet's paper (arXiv:2406.06484) trains its 340M models on word pieces; a byte model has
some 30M parameters less for want of a vocabulary. jamba has 12 mixtures of 8 experts on top, of which a token uses 2.
Not trained here: it wants an accelerator.
"""

from typing import Any

from configs import parts
from configs.hybrid import layers

SECTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "num_heads": 8},
    "local": {"kind": "local", "num_heads": 8, "window": 2048},
    "delta_net": {"kind": "delta_net", "num_heads": 8},
    "mamba": {"kind": "mamba"},
    "hyena": {"kind": "hyena"},
    "swiglu": {"kind": "swiglu"},
    "mlp": {"kind": "mlp"},
    "moe": {"kind": "moe", "activation": "swiglu", "experts": 8, "top_k": 2},
}


def get_config(name: str = "delta_net-local"):
    config = parts.base(task="text_file", file="text.txt", length=8192, steps=30_000, batch_size=64)
    config.model = layers.hybrid(name, width=1024, depth=24, sections=SECTIONS, channel="swiglu")
    config.model.norm = {"name": "rms"}
    config.model.head = {"name": "language_model"}
    config.model.causal = True
    config.model.scan = name != "looped"
    config.optimizer = parts.language(lr=3e-4, warmup=1_000)
    config.train.update(precision="bf16", remat="full", eval_every=1_000, save_every=1_000)
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in ("delta_net-local", "delta_net-global", "samba", "jamba")]
