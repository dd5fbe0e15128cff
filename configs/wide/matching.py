"""Wide Attention on LRA's retrieval (AAN pairs), byte by byte: 16 heads in 4, 2 layers or 1, 4000 bytes of each text.

Run: python -m experiments.train --config=configs/wide/matching.py:softmax-1x16 --workdir=DIR
As in the paper's code there is no CLS token, and the vector of the first byte stands for the text: pooling "first" of
the head. --config.model.head.pooling=cls mends that. Warm-up of 8000 steps is most of the training.
The grid: configs/wide/grid.py. Not yet trained: the pairs have to be fetched, and it wants an accelerator.
"""

from configs.wide import grid

HEADS = 16
GOLDEN = grid.golden(HEADS)


def get_config(arg: str = "softmax-4x4"):
    config = grid.experiment("matching", steps=10_000, warmup=8000, max_length=4000)
    config.model = grid.model(arg, heads=HEADS, width=128, hidden=512, head="matching", pooling="first")
    return config


def get_sweep():
    return grid.sweep(HEADS)
