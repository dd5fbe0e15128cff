"""What a MASFormer saves of its attention, counted and measured, beside the same model all full and all near.

    python -m experiments.attention_cost --config=configs/masformer/text_file.py:1.3B --lengths=1024,4096,16384
    python -m experiments.attention_cost --table

For each length, to standard output and as a line of results/attention_cost.jsonl:
    FLOPs      of the attention of --config, one example, forward: squares, visible and computed pairs (see spans.py
               for the convention), with the share saved beside the paper's (1 - l/N)(1 - w/T)
    the op     the attention of all layers alone, --heads of its heads, batch 1, float32: seconds forward, and forward
               and backward, and the bytes that the compiler sets aside. "score maps" is the all-full gradient with
               whole score maps (the op's reference), compiled for its bytes and not run
    the model  seconds and bytes of a training step of --model on random tokens, batch 1 ("none": left out)
The three sides take turns, round by round, up to --rounds rounds and so long as a length has used less than --seconds;
a figure is the median over rounds. --config.* overrides hold for --config and --model. No data set is read.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arch.errors import ConfigError, within
from arch.registry import TASKS
from experiments import cli, environment, spans, turns
from experiments import config as configs
from experiments.learning import records
from experiments.plan import binary, si
from experiments.program import Program

RECORD = Path(__file__).resolve().parent.parent / "results" / "attention_cost.jsonl"
SMALL = "configs/masformer/text_file.py:mini"
SIDES = ("all full", "masformer", "all near")
Record = Mapping[str, Any]


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, a list with one number a round. Short calls are warmed up, and repeated within a round."""
    repeats = {}
    for name, call in calls.items():
        once = _seconds(call, 1)  # the first takes new memory
        repeats[name] = max(1, round(0.2 / once)) if once < 0.2 else 1
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            found[name].append(_seconds(call, repeats[name]))
    return found


def _seconds(call: Callable[[], Any], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / times


def summarize(found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians by side, and how often longer all-full takes: the median over rounds, the lowest and the highest."""
    ratios = [full / mine for full, mine in zip(found["all full"], found["masformer"])]
    return {
        "seconds": {name: statistics.median(values) for name, values in found.items()},
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "rounds": len(ratios),
    }


def measure_op(model: spans.Tree, length: int, heads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The attention of all layers alone, forward and with the gradient."""
    calls: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "gradient": {}}
    memory: dict[str, dict[str, int]] = {"forward": {}, "gradient": {}}

    def compiled(side: spans.Tree, kind: str) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
        run, (count, width) = spans.stack(side, heads)
        shapes = (1, length, count, width), (model["depth"], 3, count, width)
        given = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        function = run if kind == "forward" else jax.grad(lambda x, s: jnp.square(run(x, s)).sum())
        return jax.jit(function).lower(*given).compile(), given

    for name, side in spans.sides(model).items():
        for kind in calls:
            program, given = compiled(side, kind)
            arrays = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(given)]
            calls[kind][name] = functools.partial(program, *arrays)
            memory[kind][name] = program.memory_analysis().temp_size_in_bytes
    maps, _ = compiled(spans.with_implementation(spans.sides(model)["all full"], "ref"), "gradient")
    memory["gradient"]["score maps"] = maps.memory_analysis().temp_size_in_bytes
    mixed = {(kind, name): call for name in SIDES for kind in calls for call in (calls[kind][name],)}
    found = take_turns({f"{kind} {name}": call for (kind, name), call in mixed.items()}, rounds, seconds)
    return {
        kind: {**summarize({name: found[f"{kind} {name}"] for name in SIDES}), "temp_bytes": memory[kind]}
        for kind in calls
    } | {"heads": heads}


def measure_model(tree: dict[str, Any], length: int, rounds: int, seconds: float) -> dict[str, Any]:
    """A training step of the whole model on random tokens."""
    calls, memory = {}, {}
    for name, side in spans.sides(tree["model"]).items():
        program = Program(
            configs.resolve(
                {
                    **tree,
                    "model": side,
                    "task": {**tree["task"], "length": length},
                    "train": {**tree["train"], "batch_size": 1},
                }
            )
        )
        with jax.set_mesh(program.mesh):
            calls[name] = _Stepper(program, length)
        memory[name] = program.train_step.memory_analysis().temp_size_in_bytes
    return {**summarize(take_turns(calls, rounds, seconds)), "temp_bytes": memory}


class _Stepper:
    """One training step after another, always on the same batch."""

    def __init__(self, program: Program, length: int):
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 257, (1, length + 1)).astype(np.int32)
        batch = {"inputs": tokens[:, :-1], "label": tokens[:, 1:], "keep": np.ones((1, length), bool)}
        self.program, self.state = program, program.init()
        self.batch = program.put({**batch, "weight": np.ones(1, np.float32)})

    def __call__(self) -> Any:
        with jax.set_mesh(self.program.mesh):
            self.state, values = self.program.train_step(self.state, self.batch)
        return values


def saved(flops: Mapping[str, Mapping[str, float | None]], pairs: str) -> float | None:
    """The share of all-full's FLOPs that the model does without."""
    full, mine = flops["all full"][pairs], flops["masformer"][pairs]
    return None if full is None or mine is None else 1 - mine / full


def measure(flags: argparse.Namespace, tree: dict[str, Any], small: dict[str, Any] | None, length: int) -> Record:
    """The record of one length."""
    model = tree["model"]
    with within("config"):
        flops = spans.attention_flops(model, TASKS.build(tree["task"]).spec, length)
    near = spans.roles(model)["near"]
    record: dict[str, Any] = {
        "bench": "attention_cost",
        "length": length,
        "layers": {"all": model["depth"], "full": spans.layers(model).count("full"), "where": model["where"]},
        "near": {"block": near.block, "window": near.window},
        "flops": flops,
        "saved": {pairs: saved(flops, pairs) for pairs in ("squares", "visible", "computed")},
        "formula": spans.formula(model, length),
    }
    if flags.rounds:
        record["op"] = measure_op(model, length, flags.heads, flags.rounds, flags.seconds)
        if small is not None:
            record["model"] = {"source": flags.model, **measure_model(small, length, flags.rounds, flags.seconds)}
    return record


def describe(record: Record) -> str:
    """A length in a few lines, as it is measured."""
    share = {
        name: "-" if x is None else f"{x:.1%}" for name, x in {**record["saved"], "formula": record["formula"]}.items()
    }
    lines = [f"T {record['length']}: attention FLOPs saved " + ", ".join(f"{k} {v}" for k, v in share.items())]
    parts = [(f"op, {kind}", record["op"][kind]) for kind in ("forward", "gradient")] if "op" in record else []
    parts += [("training step", record["model"])] if "model" in record else []
    for name, part in parts:
        seconds = ", ".join(f"{side} {value:.3f}" for side, value in part["seconds"].items())
        ratio, low, high = part["ratio"]
        lines.append(f"  {name:14} s: {seconds}; full / masformer {ratio:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"  {'':14} bytes: " + ", ".join(f"{k} {binary(v)}" for k, v in part["temp_bytes"].items()))
    return "\n".join(lines)


def newest(found: list[Any]) -> list[Any]:
    """The last record of each length and config, shortest first."""
    last = {(record["source"], str(record["near"]), record["length"]): record for record in found}
    return [last[key] for key in sorted(last)]


def table(found: list[Any]) -> str:
    """Markdown tables of the newest records."""
    if not found:
        return f"no record in {RECORD}"
    blocks = []
    for source in dict.fromkeys(record["source"] for record in found):
        rows = [record for record in found if record["source"] == source]
        blocks.append(f"`{source}`, {rows[-1]['device']}, commit {str(rows[-1]['commit'])[:7]}")
        blocks.append(_flops_table(rows))
        timed = [record for record in rows if "op" in record]
        if timed:
            blocks += [_op_table(timed)]
        steps = [record for record in rows if "model" in record]
        if steps:
            blocks += [f"A training step of `{steps[-1]['model']['source']}`, batch 1:", _step_table(steps)]
    return "\n\n".join(blocks)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _flops_table(rows: list[Any]) -> str:
    head = ["T", "all full", "masformer", "all near", "saved", "formula", "saved, visible", "computed / visible"]
    body = []
    for record in rows:
        flops, share = record["flops"], record["saved"]
        body.append(
            [f"{record['length']:,}"]
            + [si(flops[side]["visible"]) for side in SIDES]
            + [_share(share["squares"]), _share(record["formula"]), _share(share["visible"])]
            + [f"{flops['masformer']['computed'] / flops['masformer']['visible']:.2f}"]
        )
    return _markdown(head, body)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _op_table(rows: list[Any]) -> str:
    head = ["T", "pass", *(f"{side}, s" for side in SIDES), "full / masformer", *(f"{side}, bytes" for side in SIDES)]
    body = []
    for record in rows:
        for kind, name in (("forward", "forward"), ("gradient", "and backward")):
            part = record["op"][kind]
            memory = [binary(part["temp_bytes"][side]) for side in SIDES]
            body.append([f"{record['length']:,}", name, *_times(part), *memory])
    return _markdown(head, body)


def _step_table(rows: list[Any]) -> str:
    head = ["T", *(f"{side}, s" for side in SIDES), "full / masformer", *(f"{side}, bytes" for side in SIDES)]
    return _markdown(
        head,
        [
            [f"{r['length']:,}", *_times(r["model"]), *(binary(r["model"]["temp_bytes"][side]) for side in SIDES)]
            for r in rows
        ],
    )


def _times(part: Record) -> list[str]:
    ratio, low, high = part["ratio"]
    spread = f" ({low:.2f} to {high:.2f})" if part["rounds"] > 1 else ""
    return [*(f"{part['seconds'][side]:.3f}" for side in SIDES), f"{ratio:.2f}{spread}"]


@cli.command
def main(argv: list[str]) -> None:
    parser = cli.Parser(
        prog="python -m experiments.attention_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="tokens, separated by commas")
    parser.add_argument("--heads", type=int, default=1, help="heads of the op that is measured")
    parser.add_argument("--model", default=SMALL, help="the config whose training step is measured, or none")
    parser.add_argument("--rounds", type=int, default=5, help="at most; 0 counts FLOPs and measures nothing")
    parser.add_argument("--seconds", type=float, default=45.0, help="no new round of a measurement after these")
    parser.add_argument("--record", type=Path, default=RECORD, help="a line a length is added")
    parser.add_argument("--table", action="store_true", help="print the tables of what is recorded, and do nothing")
    source, overrides, flags = configs.split(argv, parser, required=False)
    if flags.table:
        print(table(newest(records.read(flags.record))))
        return
    if not source:
        raise ConfigError("--config", f"missing; name a masformer config, such as --config={SMALL}")
    lengths = flags.lengths.split(",")
    if not all(length.isdigit() and int(length) > 0 for length in lengths):
        raise ConfigError("--lengths", f"{flags.lengths!r} is not a list of lengths such as 1024,8192")
    if flags.heads < 1 or flags.rounds < 0:
        raise ConfigError("--heads", "must be 1 or more, and --rounds 0 or more")
    tree = configs.plain(configs.configure(source, overrides))
    small = None if flags.model == "none" else configs.plain(configs.configure(flags.model, overrides))
    with within("config"):
        spans.roles(tree["model"])
    if flags.rounds:
        environment.compile_cache()
    for length in map(int, lengths):
        record = {**measure(flags, tree, small, length), "source": source, "overrides": overrides}
        versions = {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
        records.add(flags.record, {**record, **turns.provenance(), "versions": versions})
        print(describe(record), flush=True)


if __name__ == "__main__":
    environment.quiet()
    environment.keep_memory()
    sys.exit(main(None))
