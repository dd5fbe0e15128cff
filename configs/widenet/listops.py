"""WideNet on short ListOps, beside what it is made of: shared blocks or not, experts or one feed-forward.

Run: python -m experiments.train --config=configs/widenet/listops.py:widenet --workdir=DIR
The argument:
    widenet  6 depths of one block with 4 experts, the best 2 a token, and norms of their own
    shared   the same with one feed-forward: ALBERT's sharing
    moe      6 blocks with 4 experts each
    deep     6 blocks with one feed-forward each
A token of `widenet` and `moe` goes through two experts of half the hidden units of the feed-forward of the others.
"""

from configs.synthetic import recipe

KINDS = ("widenet", "shared", "moe", "deep")
DEPTH = 6


def get_config(kind: str = "widenet"):
    if kind not in KINDS:
        raise recipe.parts.UnknownName(kind, list(KINDS))
    config = recipe.experiment(
        "softmax",
        task="listops",
        max_length=128,
        train_examples=20_000,
        validation_examples=2_000,
        test_examples=2_000,
        steps=500,
        batch_size=32,
        lr=1e-3,
        causal=False,
    )
    model = config.model
    model.depth = DEPTH
    if kind in ("widenet", "moe"):
        del model.parts["mlp"]
        model.parts.moe = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 64}
        model.channel = "moe"
    if kind in ("widenet", "shared"):
        model.topology = "widenet"
        del model["layers"]
        model.mixer = "mixer"
    return config


def get_sweep():
    return [{"arg": kind, "seed": seed} for kind in KINDS for seed in range(3)]
