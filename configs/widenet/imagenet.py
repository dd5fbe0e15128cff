"""WideNet on ImageNet-1K at 224 pixels: one block of attention and 4 experts, the best 2 a token, run at every depth.

Run: python -m experiments.train --config=configs/widenet/imagenet.py:B --workdir=DIR
Source: Xue et al. 2021, arXiv:2107.11817, and its code XueFuzhao/WideNet_Code, from which the sizes, patches of 16
pixels, the router's noise of 1 / E, capacity 1.2, balance 0.01, weight decay 0.1, 300 epochs and batch 4096 are.
Reported sizes, not checked against the paper's table: 29M, 40M and 63M. With a position for a CLS token that code's
three models come to 29.7M, 40.9M and 63.3M, these here to that less one vector of `width`.

Other than there: AdamW and a cosine where it has LAMB (base rate 0.01), so the learning rate is ViT's; no position for
a CLS token that the mean reads too; ReLU for tanh in the head; no GELU on what an expert gives out; no augmentation.
"""

from ml_collections import ConfigDict

from configs import parts
from configs.metaformer import recipe

SIZES = parts.Table(
    {
        # width, depth, heads, hidden units of an expert
        "B": (768, 12, 12, 4096),
        "L": (1024, 24, 16, 4096),
        "H": (1280, 32, 16, 5120),
    }
)


def get_config(size: str = "B"):
    width, depth, heads, hidden = SIZES[size]
    model = ConfigDict(
        {
            "topology": "widenet",
            "width": width,
            "depth": depth,
            "mixer": "full",
            "channel": "moe",
            "parts": {
                "full": {"kind": "softmax", "num_heads": heads, "bias": True},
                "moe": {"kind": "moe", "experts": 4, "top_k": 2, "capacity": 1.2, "hidden": hidden, "noise": 1 / 4},
            },
            "norm": {"name": "layer"},
            "embedding": {"name": "patches", "size": 16, "flatten": True},
            "positions": {"name": "learned"},
            "head": {"name": "classifier", "pooling": "mean", "hidden": width},
            "dropout": 0.1,
        }
    )
    config = recipe.imagenet(model, batch_size=4096, lr=3e-3, warmup_epochs=30)
    config.optimizer.weight_decay = 0.1
    return config


def get_sweep():
    return [{"arg": size, "seed": 0} for size in SIZES]
