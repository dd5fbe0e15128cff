"""DeiT tiny, small and base on ImageNet-1K at 224 pixels: the isotropic MetaFormer of 16 x 16 patches with attention.

Run: python -m experiments.train --config=configs/vision/deit.py:tiny --workdir=DIR
The architecture is ViT's at the same sizes. Source: Dosovitskiy et al. 2020, arXiv:2010.11929; Touvron et al. 2020,
arXiv:2012.12877, whose learning rate is 5e-4 x batch / 512. Without distillation.
"""

from configs import parts
from configs.metaformer import recipe

HEADS = parts.Table(tiny=3, small=6, base=12)  # of 64


def get_config(size: str = "tiny"):
    heads = HEADS[size]
    model = parts.metaformer(
        width=64 * heads,
        depth=12,
        mixer={"kind": "softmax", "num_heads": heads, "bias": True},
        channel={"ratio": 4.0, "activation": "gelu_erf"},
        positions="learned",
    )
    model.embedding = {"name": "patches", "size": 16, "flatten": True}
    model.norm.eps = 1e-6
    model.drop_path = 0.1
    return recipe.imagenet(model, batch_size=1024, lr=1e-3, warmup_epochs=5)


def get_sweep():
    return [{"arg": size, "seed": 0} for size in HEADS]
