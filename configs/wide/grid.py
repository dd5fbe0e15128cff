"""Wide Attention's grid: each attention with the same total number of heads in many layers or in few.

Source: Brown et al. 2022, arXiv:2210.00640. An aspect ratio LxH is L layers of H heads each. The head size stays, so
the query, key and value width grows with the heads, and each layer keeps one feed-forward block. Base sizes and
training are those of the first author's code [jr-brown/long-range-arena-linen @ 7dd2ece]: Adam .9/.98/1e-9, weight
decay 0.1, rate 0.05 with warm-up and rsqrt, batch 32, dropout 0.1, CLS pooling (Sinkhorn: the mean), the best
validation step is tested. It evaluates every 200 steps, here every 1000; its attention dropout is not applied. The grid
itself is in no file of that code: it is the total of the base sizes, 48 heads or 16, split evenly.

The ten attentions of the paper, and Reformer, which its code lists with a warning and its tables leave out.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import parts

ATTENTIONS = (
    *("softmax", "bigbird", "linear", "linformer", "local", "longformer", "performer", "sinkhorn", "sparse"),
    *("synthesizer", "reformer"),
)
RATIOS = {48: ("6x8", "3x16", "2x24", "1x48"), 16: ("4x4", "2x8", "1x16")}


def names(heads: int) -> list[str]:
    """The arguments of a config with so many heads in all: "softmax-6x8" and the rest."""
    return [f"{attention}-{ratio}" for attention in ATTENTIONS for ratio in RATIOS[heads]]


def golden(heads: int) -> tuple[str, ...]:
    """The few of them whose text the tests keep."""
    deep, *_, wide = RATIOS[heads]
    return f"softmax-{deep}", f"softmax-{wide}", f"synthesizer-{wide}"


def model(
    arg: str, *, heads: int, width: int, hidden: int, head: str = "classifier", pooling: str = "cls", **mixer: Any
) -> ConfigDict:
    """The model of an argument; `heads` in all, `hidden` of the feed-forward blocks and of the head."""
    depth, in_each = map(int, RATIOS[heads][0].split("x"))
    attention, ratio = parts.Table({name: name.split("-") for name in names(heads)})[arg]
    deep = parts.metaformer(
        width=width,
        depth=depth,
        mixer={**parts.MIXERS[attention], "num_heads": in_each, "head_dim": width // in_each, **mixer},
        channel={"hidden": hidden},
        head={"name": head, "hidden": hidden, "pooling": "mean" if attention == "sinkhorn" else pooling},
        dropout=0.1,
    )
    return parts.wide(deep, int(ratio.partition("x")[0]))


def experiment(task: str, *, steps: int, warmup: int, **task_options: Any) -> ConfigDict:
    """The training of the paper's code."""
    config = parts.base(task=task, steps=steps, batch_size=32, **task_options)
    config.optimizer.schedule.warmup = warmup
    config.train.eval_every = 1000
    return config


def sweep(heads: int) -> list[dict[str, Any]]:
    """Every attention at every aspect ratio, three seeds."""
    return [{"arg": name, "seed": seed} for name in names(heads) for seed in range(3)]
