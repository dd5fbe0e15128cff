"""MASFormer on the bytes of a text file of yours: a decoder, full attention in its first layers, blocks in the rest.

Run: python -m experiments.train --config=configs/masformer/text_file.py:tiny --config.task.file=BOOK.txt --workdir=DIR
Then with longer sequences, from there: the same with --config.task.length=2048 --init_from=DIR --workdir=OTHER

The argument is a size, and after it what is otherwise:
    tiny      6 layers of 128, 1 full, blocks of 128, 512 tokens: minutes on a laptop
    mini      the same with the spans of the paper, blocks of 1024 and 8192 tokens: to measure with
    125M      12 layers of 768, 2 full, blocks of 1024, 8192 tokens
    350M      24 layers of 1024, 4 full, the same spans
    1.3B      24 layers of 2048, 16 heads, 4 full, the same spans: the paper's, without its word pieces
    -window   a sliding window of the same number of tokens in the near layers instead of blocks: about twice the work
    -learned  learned positions, as GPT-Neo, instead of rotary ones
The paper (arXiv:2310.12442) has a pretrained decoder of 1.3B parameters; the sizes here are those of GPT-Neo 1.3B, its
weights and vocabulary are not. The number of full layers is an option, --config.model.num_full=8, and so is where.
"""

from ml_collections import ConfigDict

from configs import parts

SIZES = parts.Table(
    {
        # depth, width, heads, full layers, block, length, batch
        "tiny": (6, 128, 2, 1, 128, 512, 8),
        "mini": (6, 128, 2, 1, 1024, 8192, 1),
        "125M": (12, 768, 12, 2, 1024, 8192, 32),
        "350M": (24, 1024, 16, 4, 1024, 8192, 32),
        "1.3B": (24, 2048, 16, 4, 1024, 8192, 64),
    }
)
OPTIONS = parts.Table({"window": None, "learned": None})


def get_config(arg: str = "tiny"):
    size, *others = arg.split("-")
    depth, width, heads, num_full, block, length, batch = SIZES[size]
    for other in others:
        OPTIONS[other]  # names what there is, where it is none of these
    large = size not in ("tiny", "mini")
    steps = 20_000 if large else 2_000
    config = parts.base(task="text_file", steps=steps, batch_size=batch, file="text.txt", length=length)
    config.model = ConfigDict(
        {
            "topology": "masformer",
            "width": width,
            "depth": depth,
            "num_full": num_full,
            "where": "first",
            "parts": {
                "full": {"kind": "softmax", "num_heads": heads},
                "near": {"kind": "local", "num_heads": heads, "window" if "window" in others else "block": block},
                "mlp": {"kind": "mlp", "ratio": 4},
            },
            "norm": {"name": "layer"},
            "positions": {"name": "learned" if "learned" in others else "rotary"},
            "head": {"name": "language_model"},
            "causal": True,
            "scan": large,  # two loops, of the full and of the near layers: compile time stays flat with depth
        }
    )
    config.optimizer = parts.language(lr=2e-4 if large else 1e-3, warmup=steps // 20)
    config.train.update(eval_every=steps // 10, save_every=steps // 10)
    if large:
        config.train.update(precision="bf16", remat="full")
    return config


def get_sweep():
    args = ("tiny", "tiny-window", "tiny-learned", "mini", "125M", "350M", "1.3B", "1.3B-learned")
    return [{"arg": arg, "seed": 0} for arg in args]
