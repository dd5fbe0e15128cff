"""LRA ListOps: up to 2000 tokens, 10 classes; the base sizes and training of the release, so that runs compare.

Run: python -m experiments.train --config=configs/lra/listops.py:linear --workdir=DIR
The sweep is the table's eleven attentions, with the release's options where they are not the mixers' own defaults, and
FNet. Any other mixer's name is an argument too; one with a causal form only needs its wrapper: bidirectional-mamba.
The release evaluates every 50 steps; here every 250, which a CPU can bear. Its attention dropout is not applied.
Not yet measured at this size: it wants an accelerator.
"""

from typing import Any

from configs import parts

TABLE = (
    *("softmax", "local", "sparse", "longformer", "linformer", "reformer", "sinkhorn", "synthesizer", "bigbird"),
    *("linear", "performer"),
)
RELEASE: dict[str, dict[str, Any]] = {"performer": {"kernel": "softmax", "num_features": 2, "redraw": True}}


def get_config(mixer: str = "softmax"):
    config = parts.base(task="listops", max_length=2000, batch_size=32, steps=5_000)
    config.model = parts.metaformer(
        width=512,
        depth=4,
        mixer={**parts.MIXERS[mixer], **RELEASE.get(mixer, {})},
        channel={"hidden": 1024},
        head={"hidden": 1024, "pooling": "mean" if mixer == "sinkhorn" else "cls"},
        dropout=0.1,
    )
    config.train.eval_every = 250
    return config


def get_sweep():
    return [{"arg": mixer, "seed": seed} for mixer in (*TABLE, "fourier") for seed in range(3)]
