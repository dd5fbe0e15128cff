"""Wide Attention on IMDb, byte by byte: 48 heads in 6, 3, 2 layers or 1, on the first 1000 bytes of a review.

Run: python -m experiments.train --config=configs/wide/imdb_bytes.py:softmax-1x48 --workdir=DIR
Cost: python -m experiments.plan --config=configs/wide/imdb_bytes.py:softmax-6x8 \
        --against=configs/wide/imdb_bytes.py:softmax-1x48
The paper's code validates on the test reviews; here a part of the train half is held out (task.protocol=release gives
theirs). The grid: configs/wide/grid.py. Not yet trained at this size: it wants an accelerator.
"""

from configs.wide import grid

HEADS = 48
GOLDEN = grid.golden(HEADS)


def get_config(arg: str = "softmax-6x8"):
    config = grid.experiment("imdb", steps=30_000, warmup=8000, level="bytes", max_length=1000)
    config.model = grid.model(arg, heads=HEADS, width=512, hidden=2048)
    return config


def get_sweep():
    return grid.sweep(HEADS)
