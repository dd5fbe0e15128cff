"""Images out of noise: flow matching on CIFAR-10, ViT and FIT at a size for two CPU cores and a few minutes.

Run: python -m experiments.train --config=configs/diffusion/cifar10.py:vit-tiny --workdir=DIR
     python -m experiments.sample --run=DIR
vit-tiny  64 patches of 4 x 4 pixels, 4 layers of attention over all of them
fit-tiny  256 patches of 2 x 2 pixels in 16 groups of 4 x 4, 4 latents a group: local, global and local layers
--config.objective.name=ddpm takes the diffusion of Ho et al. instead. The default of 600 steps shows that the loss
falls and the colours come; pictures of things need far more steps and a larger model.
"""

from configs import parts

WIDTH, HEADS = 128, 4
SOFTMAX = {"kind": "softmax", "num_heads": HEADS}
HEAD = {"name": "denoiser", "conditional": True}


def vit():
    model = parts.metaformer(width=WIDTH, depth=4, mixer=SOFTMAX, channel={"ratio": 4.0}, positions="learned")
    model.head = HEAD
    model.embedding = {"name": "patches", "size": 4}
    return model


def fit():
    model = parts.metaformer(width=WIDTH, depth=1, mixers={"local": SOFTMAX, "global": SOFTMAX}, positions="learned")
    for key in ("depth", "layers", "channel"):
        del model[key]
    model.topology = "fit"
    model.update(pattern="(1)3(1)", group_size=(4, 4), latents=4)
    model.head = HEAD
    model.embedding = {"name": "patches", "size": 2}
    return model


MODELS = parts.Table({"vit-tiny": vit, "fit-tiny": fit})


def get_config(model: str = "vit-tiny"):
    config = parts.base(task="cifar10", batch_size=64, steps=600)
    config.objective = {"name": "flow_matching"}
    config.model = MODELS[model]()
    config.optimizer = {
        "name": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.01,
        "schedule": {"name": "cosine", "warmup": 50},
        "clip": 1.0,
        "ema": 0.99,
    }
    config.train.update(eval_batch_size=500, eval_every=300, save_every=300)
    return config


def get_sweep():
    return [{"arg": model, "seed": 0} for model in MODELS]
