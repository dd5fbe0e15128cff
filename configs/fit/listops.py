"""FIT as an encoder on LRA's ListOps, up to 2000 tokens: the base size and training of configs/lra/listops.py.

Run: python -m experiments.train --config=configs/fit/listops.py:tokens --workdir=DIR
tokens   one local layer, two global ones, one local one; the mean over tokens goes to the classes
latents  one local layer and three global ones; the mean over latents does
Groups are those that arch.fit_plan proposes, 16 latents each. Not yet measured at this size: it wants an accelerator.
"""

from configs import parts
from configs.fit.shared import fit

SOFTMAX = {"kind": "softmax", "num_heads": 8}
FORMS = parts.Table(
    tokens={"pattern": "(1)2(1)"},
    latents={"pattern": "(1)3", "output": "latents"},
)


def get_config(form: str = "tokens"):
    config = parts.base(task="listops", max_length=2000, batch_size=32, steps=5_000)
    config.model = fit(
        width=512,
        latents=16,
        local=SOFTMAX,
        across=SOFTMAX,
        channel={"hidden": 1024},
        head={"name": "classifier", "pooling": "mean", "hidden": 1024},
        dropout=0.1,
        **FORMS[form],
    )
    config.train.eval_every = 250
    return config


def get_sweep():
    return [{"arg": form, "seed": seed} for form in FORMS for seed in range(3)]
