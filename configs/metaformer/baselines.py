"""The MetaFormer baselines on ImageNet-1K at 224 pixels: five token mixers in one four-stage body.

Run: python -m experiments.train --config=configs/metaformer/baselines.py:caformer_s18 --workdir=DIR
identityformer  none              randformer  a frozen random matrix over all tokens in the last two stages
poolformerv2    average pooling   convformer  separable convolution    caformer  convolution, then attention
Source: Yu et al. 2022, arXiv:2210.13452: StarReLU, no biases in blocks, layer norm in the stem and before each
downsampling, the passing branch scaled in the last two stages, a norm behind the mean over tokens. The first three take
S12 to M48 with a linear head, the last two S18 to B36 with an MLP head. RandFormer's matrix is a hash here and holds no
parameters, one for all blocks; the paper's are drawn block by block and stored. docs/vision.md has parameters and MACs.
"""

from configs import parts
from configs.metaformer import recipe

SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
# widths, depths, stochastic depth of the last block
POOLING_SIZES = {
    "s12": (SMALL, (2, 2, 6, 2), 0.1),
    "s24": (SMALL, (4, 4, 12, 4), 0.1),
    "s36": (SMALL, (6, 6, 18, 6), 0.2),
    "m36": (MEDIUM, (6, 6, 18, 6), 0.3),
    "m48": (MEDIUM, (8, 8, 24, 8), 0.4),
}
CONV_SIZES = {
    "s18": (SMALL, (3, 3, 9, 3), 0.2),
    "s36": (SMALL, (3, 12, 18, 3), 0.3),
    "m36": ((96, 192, 384, 576), (3, 12, 18, 3), 0.4),
    "b36": ((128, 256, 512, 768), (3, 12, 18, 3), 0.6),
}
HEAD_DROPOUT = {"s18": 0.0, "s36": 0.4, "m36": 0.4, "b36": 0.5}  # CAFormer's
LAYER = {"name": "layer", "eps": 1e-6, "bias": False}
GROUP = {"name": "group", "eps": 1e-6, "bias": False}
CONV = {"kind": "conv", "size": 7, "ratio": 2.0, "grid_axes": 2}


def model(family: str, size: str):
    if family in ("convformer", "caformer"):
        widths, depths, drop_path = CONV_SIZES[size]
        norm, head = LAYER, {"name": "metaformer", "ratio": 4.0, "dropout": 0.0}
    else:
        widths, depths, drop_path = POOLING_SIZES[size]
        norm, head = GROUP, {"name": "metaformer"}
    if family == "caformer":  # heads of 32
        stages = ("conv", "conv", "attention3", "attention4")
        heads = {f"attention{i + 1}": {"kind": "softmax", "num_heads": widths[i] // 32, "head_dim": 32} for i in (2, 3)}
        mixers = {"conv": CONV, **heads}
        drop_path, head = (0.15 if size == "s18" else drop_path), {**head, "dropout": HEAD_DROPOUT[size]}
    elif family == "convformer":
        stages, mixers = ("conv",) * 4, {"conv": CONV}
    elif family == "randformer":
        stages = ("identity", "identity", "random", "random")
        mixers = {"identity": {"kind": "identity"}, "random": {"kind": "random"}}
        drop_path = 0.3 if size == "m48" else drop_path
    else:
        kind = {"poolformerv2": "pooling", "identityformer": "identity"}[family]
        stages, mixers = (kind,) * 4, {kind: {"kind": kind}}
    return parts.pyramid(
        widths=widths,
        depths=depths,
        stages=stages,
        mixers=mixers,
        channel={"ratio": 4.0, "activation": "star_relu", "bias": False},
        norm=norm,
        stem={"norm": LAYER},
        down_norm=LAYER,
        last_norm=False,
        residual_scale=(None, None, 1.0, 1.0),
        drop_path=drop_path,
        head=head,
    )


MODELS = parts.Table(
    {
        f"{family}_{size}": (family, size)
        for family in ("identityformer", "randformer", "poolformerv2", "convformer", "caformer")
        for size in (CONV_SIZES if family in ("convformer", "caformer") else POOLING_SIZES)
    }
)


def get_config(name: str = "caformer_s18"):
    family, size = MODELS[name]
    warmup = 20 if family in ("convformer", "caformer") else 5
    return recipe.imagenet(model(family, size), batch_size=4096, lr=4e-3, warmup_epochs=warmup)


def get_sweep():
    return [{"arg": name, "seed": 0} for name in MODELS]
