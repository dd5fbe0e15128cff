"""Small models on CIFAR-10, one epoch each: minutes on two CPU cores.

Run: python -m experiments.sweep --config=configs/vision/cifar10.py --workdir=DIR, or one of them:
python -m experiments.train --config=configs/vision/cifar10.py:vit-tiny --workdir=DIR
With the JPEG copy (not official CIFAR-10, and the run says so):
    --config.task.copy=JPEG-75 --config.task.data_dir=FOLDER
vit-tiny         isotropic: patches of 4 x 4 pixels, 6 layers of 3 heads, learnt positions (Dosovitskiy et al. 2020)
vit-hyena-tiny   the same with Hyena over the 8 x 8 grid of patches in place of attention (Zimerman and Wolf 2024)
poolformer-tiny  three stages of 16 x 16, 8 x 8 and 4 x 4 tokens that only pool (Yu et al. 2022). Beside the paper's
                 models the stem has a kernel of 3 and a stride of 2, and LayerScale and stochastic depth, which want
                 long training, are left out
hybrid-tiny      poolformer-tiny with attention in the last stage
All take the mean over tokens to the classes and have about as many FLOPs. Longer runs want
--config.task.train_augment=flip_crop.
"""

from configs import parts

WIDTH, DEPTH = 96, 6
ATTENTION = {"kind": "softmax", "num_heads": 3, "bias": True}
HYENA = {"kind": "hyena_nd", "filter_width": 32}
POOLING = {"kind": "pooling", "size": 3}


def isotropic(mixer):
    model = parts.metaformer(
        width=WIDTH, depth=DEPTH, mixer=mixer, channel={"ratio": 3.0}, positions="learned", head={"pooling": "mean"}
    )
    model.embedding = {"name": "patches", "size": 4}
    return model


def pyramid(*stages):
    mixers = {"pooling": POOLING, "attention": {"kind": "softmax", "num_heads": 6}}
    return parts.pyramid(
        widths=(48, 96, 192),
        depths=(2, 2, 2),
        stages=stages,
        mixers={name: mixers[name] for name in dict.fromkeys(stages)},
        channel={"ratio": 4.0, "activation": "gelu_erf"},
        norm={"name": "group"},
        stem={"size": 3, "stride": 2, "padding": 1},
    )


MODELS = parts.Table(
    {
        "vit-tiny": lambda: isotropic(ATTENTION),
        "vit-hyena-tiny": lambda: isotropic(HYENA),
        "poolformer-tiny": lambda: pyramid("pooling", "pooling", "pooling"),
        "hybrid-tiny": lambda: pyramid("pooling", "pooling", "attention"),
    }
)


def get_config(model: str = "vit-tiny"):
    config = parts.base(task="cifar10", batch_size=64, steps=700)
    config.model = MODELS[model]()
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "clip": 1.0,
        "schedule": {"name": "cosine", "warmup": 70},
    }
    config.train.update(eval_every=350, save_every=350, log_every=10, eval_batch_size=250)
    return config


def get_sweep():
    return [{"arg": name, "seed": 0} for name in MODELS]
