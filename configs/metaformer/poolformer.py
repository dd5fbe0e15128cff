"""PoolFormer S12 to M48 on ImageNet-1K at 224 pixels: average pooling as the token mixer of a four-stage MetaFormer.

Run: python -m experiments.train --config=configs/metaformer/poolformer.py:s12 --workdir=DIR
Source: Yu et al. 2022, arXiv:2111.11418; stem 7 x 7 stride 4, group norm of one group, LayerScale, exact GELU, a last
norm before the mean over tokens. Their learning rate is 1e-3 x batch / 1024. docs/vision.md has parameters and MACs.
"""

from configs import parts
from configs.metaformer import recipe

SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
# widths, depths, LayerScale's first value, stochastic depth of the last block
SIZES = parts.Table(
    s12=(SMALL, (2, 2, 6, 2), 1e-5, 0.1),
    s24=(SMALL, (4, 4, 12, 4), 1e-5, 0.1),
    s36=(SMALL, (6, 6, 18, 6), 1e-6, 0.2),
    m36=(MEDIUM, (6, 6, 18, 6), 1e-6, 0.3),
    m48=(MEDIUM, (8, 8, 24, 8), 1e-6, 0.4),
)


def get_config(size: str = "s12"):
    widths, depths, layer_scale, drop_path = SIZES[size]
    model = parts.pyramid(
        widths=widths,
        depths=depths,
        stages=("pooling",) * 4,
        mixers={"pooling": {"kind": "pooling", "size": 3}},
        channel={"ratio": 4.0, "activation": "gelu_erf"},
        norm={"name": "group", "eps": 1e-5},
        layer_scale=layer_scale,
        drop_path=drop_path,
    )
    return recipe.imagenet(model, batch_size=1024, lr=1e-3, warmup_epochs=5)


def get_sweep():
    return [{"arg": size, "seed": 0} for size in SIZES]
