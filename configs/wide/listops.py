"""Wide Attention on LRA's ListOps: 48 heads in 6, 3, 2 layers or 1, up to 2000 tokens.

Run: python -m experiments.train --config=configs/wide/listops.py:softmax-1x48 --workdir=DIR
Performer has the two random features of LRA's ListOps config, as in configs/lra/listops.py.
The grid: configs/wide/grid.py. Not yet trained at this size: it wants an accelerator.
"""

from configs.lra.listops import RELEASE
from configs.wide import grid

HEADS = 48
GOLDEN = grid.golden(HEADS)


def get_config(arg: str = "softmax-6x8"):
    config = grid.experiment("listops", steps=10_000, warmup=1000, max_length=2000)
    config.model = grid.model(arg, heads=HEADS, width=512, hidden=2048, **RELEASE.get(arg.partition("-")[0], {}))
    return config


def get_sweep():
    return grid.sweep(HEADS)
