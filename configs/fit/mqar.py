"""FIT as a decoder on recall: the recipe of configs/synthetic/mqar.py, 4 pairs of 16 keys and 16 values, length 48.

Run: python -m experiments.train --config=configs/fit/mqar.py:softmax --workdir=DIR
The argument is the mixer of both kinds of layer, or LOCAL-GLOBAL such as delta_net-softmax. What a query asks for
stands in a former group, so the answer comes through latents that were computed before the question was known: 8 of
them for each group of 16 tokens.
"""

from configs.fit.shared import fit
from configs.synthetic import recipe


def get_config(mixers: str = "softmax"):
    local, _, across = mixers.partition("-")
    config = recipe.experiment(
        local,
        task="mqar",
        length=48,
        num_pairs=4,
        vocab=32,
        filler="blank",
        train_examples=64_000,
        validation_examples=400,
        test_examples=1_000,
        steps=1_000,
        batch_size=32,
        lr=3e-3,
    )
    config.model = fit(
        width=64,
        pattern="(2)2(2)",
        group_size=16,
        latents=8,
        local=recipe.part(local, causal=True),
        across=recipe.part(across or local, causal=True),
        channel={"hidden": 128},
        head={"name": "language_model"},
        causal=True,
    )
    return config


def get_sweep():
    return [{"arg": mixers, "seed": 0} for mixers in ("softmax", "delta_net-softmax")]
