"""Pictures of what the heads of a model attend to, for examples of its task.

    python -m experiments.attention_maps --run=runs/wide --out=DIR [--checkpoint=last] [--split=test] [--examples=3]
    python -m experiments.attention_maps --config=configs/wide/imdb_bytes.py:softmax-1x48 --out=DIR    # not trained

For each example: example-N-heads.png, the weights of every head of every layer as a square; example-N-row.png, the one
row of them that the head of the model reads, heads down and tokens along; example-N.html, both pictures and the text,
shaded by that row, over all heads and head by head. It is the row of the CLS token; without one, the mean over tokens
or the last token, as the model pools. index.html lists the examples.

In a one-layer model the classifier reads that row's mixture of the input itself, so the maps are what it has gone by
(Brown et al. 2022, arXiv:2210.00640). In a deep one the later layers' tokens are mixtures already.

Any mixer with `weights` has maps; others are named and left out, and a model of others alone is refused. A map is
quadratic: [heads, T, T] in float32 a layer.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arch.errors import ConfigError
from arch.model import functional
from arch.spec import InputSpec
from experiments import cli, environment, evaluate
from experiments import config as configs
from experiments.data.spelling import spell
from experiments.maps import capture, page, pictures
from experiments.program import Program

ROWS = {"cls": "the row of the CLS token", "mean": "the mean of the tokens' rows"}


def draw(program: Program, params: Any, out: Path, *, split: str, examples: int, title: str) -> list[Path]:
    """Writes the files; returns the pages."""
    if not isinstance(program.task.spec, InputSpec) or program.task.spec.pair:
        raise ConfigError("config.task.name", "maps are drawn of a sequence of tokens; this task has pairs or images")
    program.task.prepare()
    if split not in program.task.splits:
        raise ConfigError("--split", f"{split!r} is not one of {', '.join(program.task.splits)}")
    source = program.task.source(split)
    if not 1 <= examples <= len(source):
        raise ConfigError("--examples", f"{examples}, and the split {split} has {len(source)}; take 1 to that many")
    out.mkdir(parents=True, exist_ok=True)
    model = functional({**program.config["model"], "read": "all"}, program.task.spec).module(params)
    layers, without = capture.watch(model)
    for name in without:
        print(f"left out, as it has no attention weights: {name}", file=sys.stderr)
    found = []
    for i in range(examples):
        layers.clear()
        example = source[i]
        inputs = np.asarray(example["inputs"], np.int32)
        logits = np.asarray(model(jnp.asarray(inputs[None])))
        found.append(_example(out, i, inputs, example["label"], logits[0], layers, program, model, title, split))
    page.index(out / "index.html", title, [(file.stem, file) for file in found])
    return found


def _example(
    out: Path, number: int, inputs: np.ndarray, label: Any, logits: np.ndarray, layers: list[capture.Layer],
    program: Program, model: Any, title: str, split: str,
) -> Path:  # fmt: skip
    tokens, keep = spell(program.task, inputs), inputs != 0
    if model.with_cls:
        tokens, keep = ["CLS", *tokens], np.concatenate([[True], keep])
    end = int(np.flatnonzero(keep)[-1]) + 1  # padding behind the text is not drawn
    tokens, keep = tokens[:end], keep[:end]
    names = [f"layer {n + 1}, {layer.kind}" for n, layer in enumerate(layers)]
    maps = [layer.weights[0][:, :end, :end] for layer in layers]
    pooling = model.head.pooling
    rows = [capture.reading_row(weights, keep, pooling) for weights in maps]
    about = [f"{title}. Example {number} of {split}: {int(keep.sum())} tokens."]
    if np.ndim(label) == 0:
        chances = np.exp(logits - logits.max())
        guess = int(logits.argmax())
        about.append(
            f"Class {int(label)}; the model says {guess}, with probability {chances[guess] / chances.sum():.2f}."
        )
    stem = out / f"example-{number}"
    squares, strip = stem.with_name(f"{stem.name}-heads.png"), stem.with_name(f"{stem.name}-row.png")
    row = ROWS.get(pooling, "the row of the last token")
    kinds = list(zip(names, maps))
    pictures.heads(squares, kinds, tokens, f"example {number}: from each token (down) to each token (along)")
    pictures.rows(strip, list(zip(names, rows)), tokens, f"example {number}: {row}")
    captions = [(f"{row}, head by head", strip), ("All rows: from each token, down, to each token, along", squares)]
    file = stem.with_suffix(".html")
    page.write(file, f"Example {number}", about, list(zip(names, rows)), tokens, keep, row, captions)
    return file


@cli.command
def main(argv: list[str]) -> int:
    environment.compile_cache()
    parser = cli.Parser(
        prog="experiments.attention_maps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="the folder of a trained run")
    parser.add_argument("--checkpoint", default="best", help="of the run: best, last or a step")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--examples", type=int, default=3, help="the first so many of the split")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    source, overrides, flags = configs.split(argv, parser, required=False)
    if (flags.run is None) == (not source):
        raise ConfigError("--run", "give either a run's folder or --config, for a model that is not trained")
    if flags.run is not None:
        program, params, step = evaluate.checkpoint(flags.run, flags.checkpoint, overrides)
        title = f"{flags.run.name}, step {step}"
    else:
        program = Program(configs.configure(source, overrides))
        params = program.functional.init(jax.random.key(program.config["seed"]))
        title = f"{source}, not trained"
    for file in draw(program, params, flags.out, split=flags.split, examples=flags.examples, title=title):
        print(file)
    return 0


if __name__ == "__main__":
    environment.quiet()
    environment.keep_memory()
    sys.exit(main())
