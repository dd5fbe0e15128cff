"""Draws images from a run that was trained to take noise away.

    python -m experiments.sample --run=runs/flow --count=16 --steps=50 --out=samples.png
    python -m experiments.sample --run=runs/flow --label=each --guidance=2 --sampler=euler

From the averaged parameters if the run keeps them. Writes a picture of the images side by side and, beside it with the
ending .npy, the pixels themselves, float32 [count H W C] from 0 to 1. Image i is a function of checkpoint, seed, i and
sampler, whatever the count. Prints one JSON object.
"""

import json
import math
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from arch.errors import ConfigError, unknown
from arch.layers import cast
from arch.spec import ImageSpec
from experiments import cli, diffusion, environment, evaluate
from experiments.program import DTYPES, Program
from experiments.samplers import row_keys, row_normal

SMALLEST = 96  # pixels along an image's side in the picture, at least


def sampler(program: Program, *, name: str | None, steps: int, guidance: float = 1.0) -> Callable[..., Array]:
    """Compiled at its first call: (params, key, indices int32[B], label int32[B] or None) -> images [B H W C].

    The images are normalised as the task's are. One program, with a loop over the steps.
    """
    objective, spec = diffusion_of(program), program.task.spec
    assert isinstance(spec, ImageSpec)  # or its head could not be a denoiser
    name = name or objective.samplers[0]
    if name not in objective.samplers:
        raise unknown("--sampler", name, objective.samplers, "sampler")
    dtype = DTYPES[program.config["train"]["precision"]]
    low, high = (normalised(program.task, np.full(spec.channels, value)) for value in (0.0, 1.0))

    @jax.jit
    def draw(params: Any, key: Array, indices: Array, label: Array | None) -> Float[Array, "B H W C"]:
        params = cast(params, dtype)

        def network(x: Array, time: Array, label: Array | None) -> Array:
            return program.functional.apply(params, x, time=time, label=label)

        keys = row_keys(key, indices)
        noise = row_normal(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys), spec.shape)
        ask = diffusion.guided(network, label, guidance)
        return objective.sample(
            ask, noise, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), sampler=name, steps=steps,
            bounds=(low, high),
        )  # fmt: skip

    return draw


def diffusion_of(program: Program) -> diffusion.Diffusion:
    if not isinstance(program.objective, diffusion.Diffusion):
        what = program.config["objective"]["name"]
        raise ConfigError("--run", f"the run's objective is {what}, which makes no images; name a diffusion run")
    return program.objective


def normalised(task: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 1 as the network sees them."""
    return ((pixels - np.asarray(task.mean)) / np.asarray(task.std)).astype(np.float32)


def pixels(task: Any, images: np.ndarray) -> np.ndarray:
    """From what the network sees to 0 .. 1."""
    return np.clip(images * np.asarray(task.std) + np.asarray(task.mean), 0.0, 1.0).astype(np.float32)


def labels(text: str | None, count: int, objective: diffusion.Diffusion, classes: int) -> np.ndarray | None:
    """The class of each image, as --label says; -1 is of none."""
    if not objective.conditional:
        if text is not None:
            raise ConfigError("--label", "the run learnt no classes; train with model.head.conditional=True")
        return None
    if text is None:
        return np.full(count, diffusion.NO_LABEL, np.int32)
    if text == "each":
        return (np.arange(count) % classes).astype(np.int32)
    if not text.isdigit() or int(text) >= classes:
        raise ConfigError("--label", f"{text!r} is neither each nor a class from 0 to {classes - 1}")
    return np.full(count, int(text), np.int32)


def sample(
    program: Program, params: Any, *, count: int, seed: int, draw: Callable[..., Array], label: np.ndarray | None
) -> np.ndarray:
    """[count H W C], normalised; drawn in batches of one size."""
    size = min(count, program.eval_batch_size)
    found = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        given = None if label is None else jnp.asarray(label[rows])
        found.append(np.asarray(draw(params, jax.random.key(seed), jnp.asarray(rows), given)))
    return np.concatenate(found)[:count]


def picture(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """Images [N H W C] of pixels from 0 to 1 side by side, small ones enlarged without smoothing."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.ones((rows * columns, height, width, channels), np.float32)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    scale = math.ceil(SMALLEST / min(height, width))
    whole = np.round(sheet * 255).astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(whole[..., 0] if channels == 1 else whole)


def main(argv: list[str]) -> int:
    environment.compile_cache()
    parser = cli.Parser(prog="experiments.sample", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", "--workdir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--sampler", help="heun or euler of a flow; ddim or ancestral of a DDPM")
    parser.add_argument("--label", help="a class, or each: the classes in turn")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1 is none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the picture (default: RUN/samples.png)")
    flags = parser.parse_args(argv)
    for name in ("count", "steps"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}", f"{getattr(flags, name)}; give a whole number from 1 on")
    program, params, step = evaluate.checkpoint(flags.run, flags.checkpoint)
    objective = diffusion_of(program)
    draw = sampler(program, name=flags.sampler, steps=flags.steps, guidance=flags.guidance)
    label = labels(flags.label, flags.count, objective, program.task.spec.num_classes)
    if flags.guidance != 1 and flags.label is None:
        raise ConfigError("--guidance", "guides towards a class; give --label")
    start = time.perf_counter()
    with jax.set_mesh(program.mesh):
        images = sample(program, params, count=flags.count, seed=flags.seed, draw=draw, label=label)
    out = flags.out or flags.run / "samples.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = program.task.spec.num_classes if flags.label == "each" else None
    found = pixels(program.task, images)
    picture(found, columns).save(out)
    np.save(out.with_suffix(".npy"), found)
    about = {name: getattr(flags, name) for name in ("count", "steps", "label", "guidance", "seed")}
    print(json.dumps({
        "run": str(flags.run), "step": step, "parameters": program.evaluated,
        "sampler": flags.sampler or objective.samplers[0], **about, "out": str(out),
        "mean": round(float(images.mean()), 4), "std": round(float(images.std()), 4),  # 0 and 1 in the data
        "seconds": round(time.perf_counter() - start, 2),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    environment.quiet()
    environment.keep_memory()
    sys.exit(cli.command(main)(None))
