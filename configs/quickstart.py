"""Four architectures on short ListOps (at most 128 tokens), a comparison of a few minutes on two CPU cores.

Run: scripts/quickstart, or one of them: python -m experiments.train --config=configs/quickstart.py:linear --workdir=DIR
softmax  4 layers of 4 heads           wide    the same 16 heads in one layer
linear   linear attention (elu + 1)    hybrid  pooling and softmax layers by turns
linear and hybrid are matched to softmax in parameters (within 1 %; python -m experiments.plan --match params=...).
"""

from configs import parts

WIDTH, DEPTH, HEADS = 64, 4, 4
SOFTMAX = {"kind": "softmax", "num_heads": HEADS}
LINEAR = {"kind": "linear", "num_heads": HEADS}
POOLING = {"kind": "pooling", "size": 3}


def deep():
    return parts.metaformer(width=WIDTH, depth=DEPTH, mixer=SOFTMAX, channel={"hidden": 128}, head={"hidden": 64})


MODELS = parts.Table(
    softmax=deep,
    wide=lambda: parts.wide(deep()),
    linear=lambda: parts.metaformer(
        width=WIDTH, depth=DEPTH, mixer=LINEAR, channel={"hidden": 128}, head={"hidden": 64}
    ),
    hybrid=lambda: parts.metaformer(
        width=WIDTH,
        depth=DEPTH,
        mixers={"pooling": POOLING, "softmax": SOFTMAX},
        layers=("pooling", "softmax"),
        channel={"hidden": 192},
        head={"hidden": 64},
    ),
)


def get_config(model: str = "softmax"):
    config = parts.base(
        task="listops",
        max_length=128,
        train_examples=20_000,
        validation_examples=2_000,
        test_examples=2_000,
        batch_size=32,
        steps=600,
    )
    config.model = MODELS[model]()
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.01,
        "clip": 1.0,
        "schedule": {"name": "cosine", "warmup": 60},
    }
    config.train.update(eval_every=100, save_every=300, log_every=10, eval_batch_size=200)
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in MODELS]
