"""A config's training step: its seconds and MFU on the device at hand, or its memory on a chip that is not.

    python scripts/bench_step.py --config=configs/language/text_file.py:delta_net [--steps 10] [--peak 790e12]
    python scripts/bench_step.py --config=configs/language/text_file.py:delta_net --chip v5e:4x4

Batches are random; a text file that the task wants is made of random bytes, so nothing has to be there. --peak is what
the device can do in FLOP/s, the data sheet's by default (experiments/utilisation.py). --chip compiles the step for a
TPU topology with the compiler in the package libtpu (the extra `aot`) and says what a device would need.
Appends to results/step.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arch.errors import ConfigError  # noqa: E402
from experiments import cli, environment  # noqa: E402
from experiments import config as configs  # noqa: E402


def program_of(source, overrides, folder, devices=None):
    from experiments.program import Program

    tree = configs.configure(source, overrides)
    if tree["task"]["name"] == "text_file" and "task.file" not in overrides:
        import numpy as np

        file = Path(folder) / "random.txt"
        examples = 4 * tree["train"]["batch_size"] * (tree["task"]["length"] + 1) * 10
        file.write_bytes(np.random.default_rng(0).integers(32, 127, examples, np.uint8).tobytes())
        tree = configs.configure(source, {**overrides, "task.file": str(file)})
    return Program(tree, devices)


def measure(program, steps):
    """(seconds a step by rounds, seconds to compile, the last loss) of steps that follow each other on the device."""
    import jax
    import numpy as np

    from experiments.step import metrics_of

    rng = np.random.default_rng(0)
    spec = program.task.spec
    batch = {}
    for name, shape in program._batch(program.batch_size).items():
        if name in ("keep", "weight"):
            batch[name] = np.ones(shape.shape, shape.dtype)
        elif shape.dtype.kind == "i":
            top = spec.vocab_size if name == "inputs" or program.task.token_labels else spec.num_classes
            batch[name] = rng.integers(0, top, shape.shape).astype(shape.dtype)
        else:
            batch[name] = rng.standard_normal(shape.shape).astype(shape.dtype)
    with jax.set_mesh(program.mesh):
        start = time.perf_counter()
        step = program.train_step
        compiled = time.perf_counter() - start
        batch = jax.device_put(batch, {name: program.batch_shardings[name] for name in batch})
        state, metrics = step(program.init(), batch)
        jax.block_until_ready(state)
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(state)
            rounds.append((time.perf_counter() - start) / steps)
    memory = step.memory_analysis()
    return rounds, compiled, dict(zip(metrics_of(program.objective), map(float, metrics))), memory


def run(flags, program, source):
    import jax

    from arch import accounting
    from experiments import utilisation

    rounds, compiled, metrics, memory = measure(program, flags.steps)
    seconds = statistics.median(rounds)
    flops = accounting.forward_flops(program.config["model"], program.task.spec)
    devices = program.mesh.size
    top = flags.peak or utilisation.peak(jax.devices()[0].device_kind)
    mfu = utilisation.mfu(flops, program.batch_size / seconds, top * devices) if top else None
    print(f"{source}: {program.parameters:,} parameters, {devices} x {environment.device()}")
    print(
        f"compiled in {compiled:.1f} s; a step of {program.batch_size} takes {seconds:.4f} s ({min(rounds):.4f} to ",
        end="",
    )
    print(f"{max(rounds):.4f}), {program.batch_size / seconds:.1f} examples/s, loss {metrics['loss']:.4f}")
    print(f"{3 * flops * program.batch_size / seconds / 1e12:.2f} TFLOP/s", end="")
    print(
        f", MFU {100 * mfu:.1f} % of {top * devices / 1e12:.0f}"
        if mfu
        else "; no peak is known: give --peak for the MFU"
    )
    return {
        "seconds": seconds,
        "rounds": rounds,
        "compile_seconds": compiled,
        "examples_per_second": program.batch_size / seconds,
        "forward_flops_per_example": flops,
        "peak_flops": top,
        "mfu": mfu,
        "loss": metrics["loss"],
        "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
        "peak_bytes": environment.peak_bytes(),
    }


def compile_for(flags, program, source):
    import jax

    with jax.set_mesh(program.mesh):
        start = time.perf_counter()
        step = program.train_step
        compiled = time.perf_counter() - start
    memory, text = step.memory_analysis(), step.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    gib = {name: getattr(memory, f"{name}_size_in_bytes") / 2**30 for name in ("argument", "output", "temp", "alias")}
    collectives = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    count = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in collectives}
    total = gib["argument"] + gib["output"] + gib["temp"] - gib["alias"]
    print(f"{source} on {flags.chip}: compiled in {compiled:.1f} s, {kernels} kernel calls, {total:.2f} GiB a device")
    print("collectives: " + ", ".join(f"{n} {name}" for name, n in count.items() if n))
    return {
        "chip": flags.chip,
        "compile_seconds": compiled,
        "kernels": kernels,
        "gib_per_device": total,
        **gib,
        "collectives": count,
    }


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps a round; there are three rounds")
    parser.add_argument("--peak", type=float, help="FLOP/s of one device")
    parser.add_argument("--chip", metavar="TOPOLOGY", help="v5e:4x4, v6e:2x2, ...: compile for it, run nothing")
    flags = parser.parse_known_args(argv)[0]
    source, overrides, _ = configs.split(argv, parser)
    if flags.steps < 1:
        raise ConfigError("--steps", f"must be at least 1, got {flags.steps}")
    devices = None
    if flags.chip:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=flags.chip).devices
    with tempfile.TemporaryDirectory() as folder:
        program = program_of(source, overrides, folder, devices)
        found = (compile_for if flags.chip else run)(flags, program, source)
    record = {
        "config": source,
        "overrides": overrides,
        "params": program.parameters,
        "batch_size": program.batch_size,
        "precision": program.config["train"]["precision"],
        "remat": program.config["train"]["remat"],
        **found,
        **environment.describe(),
    }
    with open(ROOT / "results" / "step.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    environment.quiet()
    sys.exit(cli.command(main)(None))
