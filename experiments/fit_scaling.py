"""FIT at growing lengths: the split it proposes, FLOPs, memory on one 16 GB chip, and time on this machine.

    python -m experiments.fit_scaling propose --length=160000 [--latents=16] [--pattern="(2)4(2)"]
    python -m experiments.fit_scaling propose --grid=400,400
    python -m experiments.fit_scaling count              FLOPs of a training step, from the jaxpr; nothing is compiled
    python -m experiments.fit_scaling chip               compiles the training step for one TPU v5e; needs libtpu
    python -m experiments.fit_scaling time               training steps on this machine, by the clock
    python -m experiments.fit_scaling train              a short training run at one length on this machine

The model reads square images in 16 x 16 patches, boxes of patches as groups, and is trained as a classifier, batch 1,
AdamW, bf16 (time and train: float32, which CPUs are made for), every layer recomputed in the backward pass: pattern
"(2)4(2)4(2)", width 256 for tokens and 512 for latents. --sides are of images in pixels: 6400 makes 160K tokens, the
paper's largest (Chen and Li 2023, arXiv:2305.12689). Each command but propose adds lines to results/fit.jsonl
(--record), the last the slopes over lengths: the exponent e of x = c L^e, least squares on logarithms, over all lengths
and from 10K tokens on.

Memory is XLA's own account for the chip: arguments + outputs - what they share + temporaries + code. The limit is what
a v5e leaves to a program, 15.75 of its 16 GiB.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from arch.errors import ConfigError
from experiments import cli

ROOT = Path(__file__).resolve().parent.parent
PATCH, CLASSES = 16, 8
SIDES = {  # pixels: 512 is 1K tokens, 1600 10K, 3200 40K, 6400 160K
    "count": (512, 800, 1600, 2400, 3200, 4800, 6400),
    "chip": (512, 1600, 3200, 6400),
    "time": (1600, 3200, 6400),
    "train": (6400,),
}
LONG = 10_000  # tokens from which the second slope is taken
CHIP, LIMIT = "v5e:2x2", 15.75 * 2**30
PEAK = 197e12  # bf16 FLOP/s of a v5e chip, as Google states it


def model(side: int, width: int, latent_width: int, latents: int, pattern: str) -> dict[str, Any]:
    """The section `model` for images of so many pixels a side."""
    from arch.fit_plan import propose

    grid = side // PATCH
    return {
        "topology": "fit",
        "width": width,
        "latent_width": latent_width,
        "pattern": pattern,
        "group_size": propose((grid, grid), latents=latents, pattern=pattern).group_size,
        "latents": latents,
        "token_positions": "learned",
        "cross_heads": 4,
        "parts": {
            "local": {"kind": "softmax", "num_heads": width // 64},
            "global": {"kind": "softmax", "num_heads": latent_width // 64},
            "mlp": {"kind": "mlp"},
        },
        "scan": True,
        "norm": {"name": "layer"},
        "embedding": {"name": "patches", "size": PATCH},
        "positions": {"name": "none"},
        "head": {"name": "classifier", "pooling": "mean"},
        "dropout": 0.0,
    }


class Step:
    """The training step of one size, as a function of (state, batch), with shapes to lower it at."""

    def __init__(self, side: int, flags: Any, dtype: Any):
        import jax
        import jax.numpy as jnp

        from arch.model import functional
        from arch.spec import ImageSpec
        from experiments import optim, step

        self.side, self.tokens = side, (side // PATCH) ** 2
        self.config = model(side, flags.width, flags.latent_width, flags.latents, flags.pattern)
        net = functional(self.config, ImageSpec(side, side, 3, CLASSES), remat=flags.remat)
        optimizer = optim.Optimizer(
            *(optim.adamw(weight_decay=0.01), optim.constant(lr=flags.lr, warmup=10)), clip=1.0, accumulate=1, ema=None
        )
        self.init = lambda: step.init_state(jnp.uint32(0), init=net.init, optimizer=optimizer, latch=False)
        self.state = jax.eval_shape(self.init)
        self.params = sum(leaf.size for leaf in jax.tree.leaves(self.state["params"]))
        shape = jax.ShapeDtypeStruct
        self.batch = {
            "inputs": shape((1, side, side, 3), jnp.float32),
            "label": shape((1,), jnp.int32),
            "weight": shape((1,), jnp.float32),
        }

        def run(state: Any, batch: Any) -> Any:
            return step.train_step(state, batch, apply=net.apply_with_losses, optimizer=optimizer, dtype=dtype)

        self.run = run

    def describe(self) -> dict[str, Any]:
        box = self.config["group_size"]
        grid = self.side // PATCH
        groups = -(-grid // box[0]) * -(-grid // box[1])
        return {
            "tokens": self.tokens,
            "image": f"{self.side}x{self.side} in {PATCH}x{PATCH} patches",
            "group": "x".join(map(str, box)),
            "groups": groups,
            "latents_per_group": self.config["latents"],
            "params": self.params,
        }

    def flops(self) -> float:
        from arch import flops
        from kernels_pallas import dispatch

        with dispatch.target("cpu"):  # the XLA forms are counted, whatever device this is for
            return flops.count(self.run, self.state, self.batch).flops


def slope(rows: list[dict[str, Any]], field: str, least: int = 0) -> float | None:
    """The exponent of a field over tokens; None with fewer than two lengths."""
    import numpy as np

    pairs = [(row["tokens"], row[field]) for row in rows if row["tokens"] >= least and row.get(field)]
    if len(pairs) < 2:
        return None
    tokens, values = np.log(np.array(pairs, float)).T
    return round(float(np.polyfit(tokens, values, 1)[0]), 3)


def numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(flag, f"{text!r} is not whole numbers with commas between") from None


def propose(flags: Any) -> list[dict[str, Any]]:
    from arch import fit_plan

    if (flags.length is None) == (flags.grid is None):
        raise ConfigError("command line", "propose wants --length=N or --grid=H,W")
    axes = flags.length if flags.grid is None else numbers("--grid", flags.grid)
    print(fit_plan.propose(axes, latents=flags.latents, pattern=flags.pattern))
    return []


def count(flags: Any) -> list[dict[str, Any]]:
    import jax.numpy as jnp

    from arch import fit_plan

    rows = []
    for side in flags.sides:
        step = Step(side, flags, jnp.bfloat16)
        grid = (side // PATCH, side // PATCH)
        split = fit_plan.cost(grid, step.config["group_size"], flags.latents, fit_plan.parse(flags.pattern))
        row = {"bench": "fit_flops", **step.describe(), "flops": step.flops(), "scores": split.scores}
        rows.append(row)
        print(f"{row['tokens']:>8} tokens: {row['flops']:.4g} FLOPs a training step, {row['scores']:.4g} scores a head")
    return [*rows, slopes(rows, "fit_flops_slope", ("flops", "scores"))]


def chip(flags: Any) -> list[dict[str, Any]]:
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("chip", "needs the TPU compiler: pip install -e '.[aot]' (libtpu); no TPU is needed")
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from kernels_pallas import dispatch

    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=CHIP).devices[0]
    place = SingleDeviceSharding(device)
    rows = []
    for side in flags.sides:
        step = Step(side, flags, jnp.bfloat16)
        given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (step.state, step.batch))
        started = time.perf_counter()
        with dispatch.target("tpu", device.device_kind):
            compiled = jax.jit(step.run, donate_argnums=0).lower(*given).compile()
        seconds = time.perf_counter() - started
        memory: Any = compiled.memory_analysis()
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "outputs_not_shared": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        }
        flops = step.flops()
        row = {"bench": "fit_chip", "chip": CHIP, **step.describe(), "bytes": sum(parts.values()), "parts": parts}
        row |= {"limit_bytes": LIMIT, "fits": sum(parts.values()) <= LIMIT, "flops": flops, "remat": flags.remat}
        row |= {"seconds_at_peak": flops / PEAK, "compile_seconds": round(seconds, 1)}
        rows.append(row)
        print(
            f"{row['tokens']:>8} tokens: {row['bytes'] / 2**30:.2f} GiB of {LIMIT / 2**30:.2f} "
            f"({'fits' if row['fits'] else 'does not fit'}), {flops:.4g} FLOPs = {flops / PEAK:.3f} s at the chip's "
            f"peak, compiled in {seconds:.0f} s",
            flush=True,
        )
    return [*rows, slopes(rows, "fit_chip_slope", ("bytes", "flops"))]


def image(side: int, index: int) -> dict[str, Any]:
    """Noise, and somewhere a square of a quarter of the side in one of 8 colours, bright or not in each channel."""
    import numpy as np

    rng = np.random.default_rng((17, index))
    pixels = rng.standard_normal((1, side, side, 3), np.float32)
    label, edge = int(rng.integers(CLASSES)), side // 4
    top, left = rng.integers(side - edge, size=2)
    pixels[:, top : top + edge, left : left + edge] += 3.0 * np.array([label >> n & 1 for n in range(3)], np.float32)
    return {"inputs": pixels, "label": np.array([label], np.int32), "weight": np.ones(1, np.float32)}


def compiled(side: int, flags: Any) -> tuple[Step, Any, Any, float]:
    """The step, its compiled form, a fresh state, and the seconds it took to compile."""
    import jax
    import jax.numpy as jnp

    step = Step(side, flags, jnp.float32)
    started = time.perf_counter()
    run = jax.jit(step.run, donate_argnums=0).lower(step.state, step.batch).compile()
    return step, run, jax.jit(step.init)(), time.perf_counter() - started


def clock(flags: Any) -> list[dict[str, Any]]:
    """Seconds a training step on one image: the least of `rounds` behind a first, or that, where patience ends."""
    from experiments import environment

    rows: list[dict[str, Any]] = []
    for side in flags.sides:
        step, run, state, seconds = compiled(side, flags)
        batch, times, losses = image(side, 0), [], []
        for _ in range(flags.rounds + 1):
            started = time.perf_counter()
            state, metrics = run(state, batch)
            losses.append(float(metrics[0]))
            times.append(time.perf_counter() - started)
            if sum(times) > flags.patience:
                break
        took = min(times[1:] or times)
        row = {"bench": "fit_time", **step.describe(), "seconds": took, "all_seconds": times, "losses": losses}
        row |= {"flops": step.flops(), "peak_bytes_so_far": environment.peak_bytes()}
        rows.append(row)
        print(
            f"{row['tokens']:>8} tokens: {took:.2f} s a training step ({row['flops'] / took / 1e9:.0f} GFLOP/s), "
            f"peak memory so far {row['peak_bytes_so_far'] / 2**30:.1f} GiB, compiled in {seconds:.0f} s",
            flush=True,
        )
        del state, run
    return [*rows, slopes(rows, "fit_time_slope", ("seconds", "flops"))]


def train(flags: Any) -> list[dict[str, Any]]:
    """A few images by turns, at the longest of --sides: the loss must fall."""
    from experiments import environment

    step, run, state, _ = compiled(max(flags.sides), flags)
    started, losses = time.perf_counter(), []
    for n in range(flags.steps):
        state, metrics = run(state, image(step.side, n % flags.images))
        losses.append(float(metrics[0]))
        print(f"step {n + 1}: loss {losses[-1]:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
        if time.perf_counter() - started > flags.patience:
            break
    row = {"bench": "fit_train", **step.describe(), "steps": len(losses), "losses": losses}
    row |= {
        "images": flags.images,
        "seconds": time.perf_counter() - started,
        "peak_bytes": environment.peak_bytes(),
        "lr": flags.lr,
    }
    return [row]


def slopes(rows: list[dict[str, Any]], bench: str, fields: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"bench": bench, "tokens": [row["tokens"] for row in rows]}
    for field in fields:
        found[field] = {"all": slope(rows, field), "from_10k": slope(rows, field, LONG)}
        print(f"exponent of {field}: {found[field]['all']}, from {LONG} tokens on {found[field]['from_10k']}")
    return found


def write(rows: list[dict[str, Any]], record: Path, flags: Any) -> None:
    import jax

    from experiments import environment

    commit, dirty = environment.source_version()
    shared = {
        "model": {name: getattr(flags, name) for name in ("pattern", "width", "latent_width", "latents", "remat")},
        "device": environment.device(),
        "commit": commit,
        "dirty": dirty,
        "command": ["python", *sys.orig_argv[1:]],
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **shared}) + "\n")
    print(f"{len(rows)} lines added to {record}")


COMMANDS = {"propose": propose, "count": count, "chip": chip, "time": clock, "train": train}


@cli.command
def main(argv: list[str]) -> None:
    import argparse

    parser = cli.Parser(
        prog="python -m experiments.fit_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--length", type=int, help="propose: tokens of a sequence")
    parser.add_argument("--grid", help="propose: tokens along each side, H,W")
    parser.add_argument("--sides", help="pixels along the images' sides, commas between")
    parser.add_argument("--pattern", default="(2)4(2)4(2)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--latent_width", type=int, default=512)
    parser.add_argument("--latents", type=int, default=16, help="a group")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    parser.add_argument("--lr", type=float, default=1e-4, help="after a warm-up of 10 steps")
    parser.add_argument("--images", type=int, default=4, help="train: how many different ones")
    parser.add_argument("--rounds", type=int, default=1, help="time: steps that count, behind a first")
    parser.add_argument("--steps", type=int, default=2, help="train: steps")
    parser.add_argument("--patience", type=float, default=100.0, help="time, train: seconds after which a length ends")
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "fit.jsonl")
    flags = parser.parse_args(argv)
    flags.sides = numbers("--sides", flags.sides) if flags.sides else SIDES.get(flags.command, ())
    if any(side < PATCH or side % PATCH for side in flags.sides):
        raise ConfigError("--sides", f"{flags.sides}: give multiples of {PATCH}, the pixels along a patch")
    rows = COMMANDS[flags.command](flags)
    if rows:
        write(rows, flags.record, flags)


if __name__ == "__main__":
    sys.exit(main())
