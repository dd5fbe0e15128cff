"""How the models on ImageNet-1K are trained: 300 epochs of 224 pixels, AdamW, a cosine after a warm-up.

Random cuts and flips, stochastic depth and label smoothing are there. What the papers add and this does not have:
RandAugment, Mixup, CutMix, random erasing, repeated augmentation, and LAMB in CAFormer's case. An epoch is of the whole
train set, of which the sound protocol holds 10,000 images out.
"""

from ml_collections import ConfigDict

from configs import parts

IMAGES = 1_281_167  # of the train split


def imagenet(model: ConfigDict, *, batch_size: int, lr: float, warmup_epochs: int, epochs: int = 300) -> ConfigDict:
    """The experiment that trains the model; lr is the peak at this batch size."""
    per_epoch = IMAGES // batch_size
    config = parts.base(
        task="imagenet", size=224, train_augment="resized_crop", batch_size=batch_size, steps=epochs * per_epoch
    )
    config.model = model
    config.optimizer = {
        "name": "adamw",
        "lr": lr,
        "weight_decay": 0.05,
        "decay": "matrices",
        "b2": 0.999,
        "eps": 1e-8,
        "schedule": {"name": "cosine", "warmup": warmup_epochs * per_epoch},
    }
    config.train.update(
        eval_every=per_epoch, save_every=per_epoch, eval_batch_size=500, precision="bf16", label_smoothing=0.1
    )
    return config
