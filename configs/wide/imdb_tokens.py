"""Wide Attention on IMDb, word by word: 48 heads in 6, 3, 2 layers or 1, on the first 1000 words of a review.

Run: python -m experiments.train --config=configs/wide/imdb_tokens.py:softmax-1x48 --workdir=DIR
Every word of the train half has an embedding, as in the paper's code: 93,929 of them, 48 million parameters in every
model of the grid. With the held-out reviews (task.protocol=sound, the default) some of them stay unknown.
The grid: configs/wide/grid.py. Not yet trained at this size: it wants an accelerator.
"""

from configs.wide import grid

HEADS = 48
GOLDEN = grid.golden(HEADS)
WORDS = 93_929  # in the 25,000 reviews of the train half


def get_config(arg: str = "softmax-6x8"):
    config = grid.experiment("imdb", steps=30_000, warmup=8000, level="words", max_length=1000, vocab_size=WORDS + 2)
    config.model = grid.model(arg, heads=HEADS, width=512, hidden=2048)
    return config


def get_sweep():
    return grid.sweep(HEADS)
