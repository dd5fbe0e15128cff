"""A language model of 350M parameters on the bytes of a text file of yours: the size at which mixers are compared.

Plan: python -m experiments.plan --config=configs/language/text_file.py:delta_net
Time: python scripts/bench_step.py --config=configs/language/text_file.py:delta_net
24 layers of 1024, heads of 128, SwiGLU, RMS norm, sequences of 2048 bytes; the argument names the mixer. The shape is
that of the 340M models of DeltaNet's paper (Yang et al. 2024, arXiv:2406.06484), which reads word pieces: what their
vocabulary takes is spent on a wider SwiGLU here (3328 instead of 2816).
Not trained here: it wants an accelerator.
"""

from configs import parts

MIXERS = {name: {"kind": name, "num_heads": 8} for name in ("softmax", "linear", "retention", "gla")}
MIXERS |= {name: {"kind": name, "num_heads": 8} for name in ("delta_net", "gated_delta", "hedgehog")}
GOLDEN = ("softmax", "delta_net")


def get_config(mixer: str = "delta_net"):
    config = parts.base(task="text_file", file="text.txt", length=2048, steps=30_000, batch_size=256)
    config.model = parts.metaformer(width=1024, depth=24, mixer=MIXERS.get(mixer, parts.MIXERS[mixer]))
    config.model.parts.mlp = {"kind": "swiglu", "hidden": 3328}
    config.model.positions.name = "rotary" if mixer == "softmax" else "none"
    config.model.norm = {"name": "rms"}
    config.model.head = {"name": "language_model"}
    config.model.causal = True
    config.model.scan = True
    config.optimizer = parts.language(lr=3e-4, warmup=1_000)
    config.train.update(precision="bf16", remat="full", eval_every=1_000, save_every=1_000)
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in (*MIXERS, "mamba")]
