"""PoolFormer-tiny on CIFAR-10, one epoch: three stages of 16 x 16, 8 x 8 and 4 x 4 tokens, no attention anywhere.

Run: python -m experiments.train --config=configs/vision/cifar10_poolformer.py --workdir=DIR
The training is that of configs/vision/cifar10.py, whose models have about as many FLOPs; so are the options for the
JPEG copy. Beside the paper's models (configs/metaformer/poolformer.py) the stem has a kernel of 3 and a stride of 2,
and LayerScale and stochastic depth, which want long training, are left out. The argument `hybrid` has attention in the
last stage.
"""

from configs import parts
from configs.vision import cifar10

STAGES = parts.Table(pooling=("pooling",) * 3, hybrid=("pooling", "pooling", "attention"))
MIXERS = {"pooling": {"kind": "pooling", "size": 3}, "attention": {"kind": "softmax", "num_heads": 6}}


def get_config(stages: str = "pooling"):
    config = cifar10.get_config()
    used = STAGES[stages]
    config.model = parts.pyramid(
        widths=(48, 96, 192),
        depths=(2, 2, 2),
        stages=used,
        mixers={name: MIXERS[name] for name in dict.fromkeys(used)},
        channel={"ratio": 4.0, "activation": "gelu_erf"},
        norm={"name": "group"},
        stem={"size": 3, "stride": 2, "padding": 1},
    )
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in STAGES]
