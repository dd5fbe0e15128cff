"""FIT as an encoder of images, small: CIFAR-10, one epoch, beside the models of configs/vision/cifar10.py.

Run: python -m experiments.train --config=configs/fit/cifar10.py:tokens --workdir=DIR
With the JPEG copy (not official CIFAR-10, and the run says so):
    --config.task.copy=JPEG-75 --config.task.data_dir=FOLDER
256 patches of 2 x 2 pixels in 16 boxes of 4 x 4, 4 latents a box.
tokens   two local layers, two global ones, two local ones; the mean over patches goes to the classes
latents  two local layers and four global ones; the mean over latents does
pooling  tokens, with PoolFormer's pooling within the boxes
"""

from configs import parts
from configs.fit.shared import fit

SOFTMAX = {"kind": "softmax", "num_heads": 3, "bias": True}
FORMS = parts.Table(
    tokens={"pattern": "(2)2(2)"},
    latents={"pattern": "(2)4", "output": "latents"},
    pooling={"pattern": "(2)2(2)", "local": {"kind": "pooling"}},
)


def get_config(form: str = "tokens"):
    config = parts.base(task="cifar10", batch_size=64, steps=700)
    given = {"local": SOFTMAX, "across": SOFTMAX, **FORMS[form]}
    config.model = fit(width=96, group_size=(4, 4), latents=4, cross_heads=3, channel={"ratio": 3.0}, **given)
    config.model.embedding = {"name": "patches", "size": 2}
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
    return [{"arg": form, "seed": 0} for form in FORMS]
