"""FIT as a decoder on the bytes of a text file of yours.

Run: python -m experiments.train --config=configs/fit/text_file.py:tiny --config.task.file=BOOK.txt --workdir=DIR
tiny  width 128, 512 tokens in groups of 64, 8 latents each: minutes on a laptop
long  width 512 and 768 for latents, 65,536 tokens in groups as arch.fit_plan proposes, 16 latents each, batch 1
"""

from configs import parts
from configs.fit.shared import fit

SIZES = parts.Table(
    tiny=lambda: fit(
        width=128,
        pattern="(2)2(2)",
        group_size=64,
        latents=8,
        head={"name": "language_model"},
        causal=True,
    ),
    long=lambda: fit(
        width=512,
        latent_width=768,
        pattern="(2)4(2)4(2)",
        latents=16,
        local={"kind": "softmax", "num_heads": 8},
        across={"kind": "softmax", "num_heads": 12},
        cross_heads=8,
        head={"name": "language_model"},
        causal=True,
        scan=True,
    ),
)


def get_config(size: str = "tiny"):
    long = size == "long"
    steps, length, batch = (20_000, 65_536, 1) if long else (2_000, 512, 8)
    config = parts.base(task="text_file", steps=steps, batch_size=batch, file="text.txt", length=length)
    config.model = SIZES[size]()
    config.optimizer = parts.language(lr=3e-4 if long else 1e-3, warmup=steps // 20)
    config.train.update(eval_every=steps // 10, save_every=steps // 10)
    if long:
        config.train.update(precision="bf16", remat="full")
    return config


def get_sweep():
    return [{"arg": size, "seed": 0} for size in SIZES]
