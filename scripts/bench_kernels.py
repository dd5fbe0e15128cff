"""Ops against named peers on this machine, as ratios of one run: on its CPU, or with --gpu on its GPU.

    python scripts/bench_kernels.py [OP ...] [--rounds 7] [--torch-python PYTHON]
    python scripts/bench_kernels.py --gpu [OP ...] [--case TEXT] [--rounds 20] [--torch-python PYTHON]

The cases of the CPU are in scripts/cases/<op>.py: a forward and backward pass, float32. Those of a GPU are in
scripts/gpu_cases/<op>.py: bf16, the sizes of training, each beside its floor by the formulas at --peak FLOP/s and
--bandwidth bytes/s. The sides take turns, those of jax and of torch in processes of their own; a ratio is the peer's
time by ours, the median over rounds (lowest to highest). No time is taken unless the sides' results agree. Cases with
a torch side need the extra `peers`, on a GPU a torch for CUDA and flash-linear-attention; --without leaves such a side
out. --tiny runs the GPU's cases at small shapes on any device, to see that they run. Adds a line an op to
results/kernels/bench.jsonl, or results/kernels/gpu.jsonl.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path

import turns

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results" / "kernels"


def ops_of(folder):
    return sorted(file.stem for file in (Path(__file__).parent / folder).glob("[a-z]*.py"))


def cases_of(folder, op):
    return importlib.import_module(f"{folder}.{op}").CASES


def start(framework, folder):
    """Imports the framework; its version by its name."""
    if framework == "jax":
        if folder == "cases":
            os.environ["JAX_PLATFORMS"] = "cpu"
        sys.path.insert(0, str(ROOT))
        import jax

        from experiments import environment

        environment.keep_memory()  # as the trainer does
        return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.cuda.get_device_name() if folder == "gpu_cases" and torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "device": device}
    if importlib.util.find_spec("fla"):
        versions["fla-core"] = importlib.metadata.version("fla-core")
    return versions


def serve(framework):
    """(versions, a function (op, case, side, times) that runs a side so often; returns the arrays' norms and facts)."""
    versions = start(framework, "cases")
    made = {}

    def run(op, case, name, times):
        import numpy as np

        key = (op, case, name)
        if key not in made:
            for other in [each for each in made if each[:2] != key[:2]]:
                del made[other]  # one case's arrays at a time
            made[key] = next(each for each in cases_of("cases", op) if each.name == case).sides[name].make()
        step, facts = made[key]
        for _ in range(times):
            result = step()
        return {"norms": [float(np.linalg.norm(np.asarray(a).ravel().astype(complex))) for a in result], **facts}

    return versions, run


def serve_gpu(framework):
    """(versions, a function (op, case, side, tiny, time) -> a sample of the results, or the milliseconds of a call)."""
    versions = start(framework, "gpu_cases")
    import gpu_cases

    timers = {"jax": gpu_cases.jax_timer, "torch": gpu_cases.torch_timer}
    made = {}

    def run(op, case, name, tiny, timed):
        key = (op, case, name)
        if key not in made:
            for other in [each for each in made if each[:2] != key[:2]]:
                del made[other]  # one case's arrays at a time: the device holds two processes
            found = next(each for each in cases_of("gpu_cases", op) if each.name == case)
            made[key] = timers[framework](found, found.sides[name], tiny)
        measure, samples = made[key]
        return {"milliseconds": measure()} if timed else {"samples": samples}

    return versions, run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="all by default")
    parser.add_argument("--gpu", action="store_true", help="the cases of a GPU, on this machine's")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: small shapes on any device, nothing recorded")
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--without", nargs="*", default=[], metavar="SIDE", help="peers to leave out")
    parser.add_argument("--rounds", type=int, help="7 on a CPU, 20 on a GPU")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores for each side")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--peak", type=float, default=790e12, help="FLOP/s of the GPU: an H200's, measured, bf16")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes/s of the GPU: an H200's copy, measured")
    parser.add_argument("--record", type=Path, help="a line an op is added")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.gpu |= options.tiny
    folder = "gpu_cases" if options.gpu else "cases"
    if options.child:
        function = serve_gpu if options.gpu else serve
        return turns.serve(options.threads, lambda: function(options.child))
    known = ops_of(folder)
    if unknown := sorted(set(options.ops) - set(known)):
        parser.error(f"no op {unknown[0]!r}; there are {', '.join(known)}")
    if options.gpu and not options.tiny and not has_gpu():
        print(
            "bench_kernels: jax sees no GPU here; --tiny runs the cases at small shapes on any device", file=sys.stderr
        )
        return 2
    cases = {op: [c for c in cases_of(folder, op) if options.case in c.name] for op in options.ops or known}
    sides = {op: {case.name: chosen(case, options) for case in found} for op, found in cases.items()}
    frameworks = {side.framework for op in sides.values() for names in op.values() for side in names.values()}
    if "torch" in frameworks and turns.torch_missing(options.torch_python):
        return 2
    children = {name: child_of(name, options) for name in sorted(frameworks)}
    record = options.record or RECORDS / ("gpu.jsonl" if options.gpu else "bench.jsonl")
    rounds = options.rounds or (20 if options.gpu else 7)
    for op, found in cases.items():
        if not found:
            continue
        print(op, flush=True)
        results = {}
        for case in found:
            names = sides[op][case.name]
            if options.gpu:
                results[case.name] = measure_gpu(op, case, names, children, rounds, options)
            else:
                results[case.name] = measure(op, case, children, rounds)
        line = {"bench": "gpu" if options.gpu else "ops", "op": op, "cases": results, "threads": options.threads}
        if options.tiny and options.record is None:
            continue
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as file:
            file.write(json.dumps({**line, **turns.provenance(*children.values())}) + "\n")
    for child in children.values():
        child.close()
    return 0


def has_gpu():
    """Asked of another process, so that this one holds nothing on the device."""
    import subprocess

    script = "import jax; raise SystemExit(jax.devices()[0].platform != 'gpu')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def chosen(case, options):
    """The sides of a case that run."""
    fit = lambda side: not options.tiny or side.cpu  # noqa: E731
    return {
        name: side
        for name, side in case.sides.items()
        if name not in options.without and (not options.gpu or fit(side))
    }


def child_of(name, options):
    interpreter = {"jax": sys.executable, "torch": options.torch_python}[name]
    command = [interpreter, __file__, "--child", name, f"--threads={options.threads}"] + ["--gpu"] * options.gpu
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if options.gpu else {}
    return turns.Side(name, command, options.threads, **variables)


def measure(op, case, children, rounds):
    """Medians over rounds of about half a second a side; where the sides do the same work their results must agree."""

    def run(name, times):
        return children[case.sides[name].framework].run(op, case.name, name, times)

    first = {name: run(name, 1)["result"] for name in case.sides}
    ours, *peers = case.sides
    for name in peers:
        pairs = list(zip(first[ours]["norms"], first[name]["norms"], strict=case.tolerance is not None))
        if case.tolerance is not None and not all(abs(a - b) <= case.tolerance * abs(b) for a, b in pairs):
            raise SystemExit(f"bench_kernels: {op}, {case.name}: the results differ: {pairs}")
    once = {name: run(name, 2)["seconds"] / 2 for name in case.sides}
    times = {name: max(1, round(0.5 / once[name])) for name in case.sides}
    milliseconds = {name: [] for name in case.sides}
    for _ in range(rounds):
        for name in case.sides:
            milliseconds[name].append(1e3 * run(name, times[name])["seconds"] / times[name])
    found = ratios(case, milliseconds, 2)
    bytes_of = {name: facts["temp_bytes"] for name, facts in first.items() if "temp_bytes" in facts}
    if bytes_of:
        found["temp_bytes"] = bytes_of
        if len(bytes_of) > 1:
            print(f"  {'':36} temporary MB: { {k: round(v / 1e6, 1) for k, v in bytes_of.items()} }", flush=True)
    return found


def measure_gpu(op, case, sides, children, rounds, options):
    """Medians over rounds, in both orders by turns; nothing is timed before the results agree."""

    def run(name, timed):
        return children[sides[name].framework].run(op, case.name, name, options.tiny, timed)["result"]

    ours, *peers = sides
    samples = {name: run(name, False)["samples"] for name in sides}
    errors = {name: [distance(a, b) for a, b in zip(samples[ours], samples[name])] for name in peers}
    for name in peers:
        if case.tolerance is not None and not all(error <= case.tolerance for error in errors[name]):
            raise SystemExit(f"bench_kernels: {op}, {case.name}: {ours} and {name} differ by {errors[name]}")
    milliseconds = {name: [] for name in sides}
    for n in range(rounds if not options.tiny else 2):
        for name in list(sides)[:: 1 if n % 2 == 0 else -1]:
            milliseconds[name].append(run(name, True)["milliseconds"])
    found = ratios(case, milliseconds, 4)
    floor = 1e3 * max(case.flops / options.peak, case.bytes / options.bandwidth)
    if floor and not options.tiny:
        share = floor / found["milliseconds"][ours]
        found |= {"floor_ms": round(floor, 4), "of_roofline": round(share, 4)}
        print(f"  {'':36} floor {floor:.3f} ms, {share:.0%} of it reached", flush=True)
    return {**found, "relative_rms": {name: [round(e, 6) for e in values] for name, values in errors.items()}}


def distance(a, b):
    """Relative RMS difference of two samples."""
    square = sum(y * y for y in b)
    return (sum((x - y) ** 2 for x, y in zip(a, b)) / square) ** 0.5 if square else float(any(a))


def ratios(case, milliseconds, digits):
    ours, *peers = milliseconds
    found = {"milliseconds": {name: round(statistics.median(each), digits) for name, each in milliseconds.items()}}
    print(f"  {case.name:36} ms: {found['milliseconds']}", flush=True)
    for name in peers:
        each = [theirs / mine for mine, theirs in zip(milliseconds[ours], milliseconds[name])]
        ratio, low, high = statistics.median(each), min(each), max(each)
        found.setdefault("ratio", {})[name] = [round(x, 3) for x in (ratio, low, high)]
        goal = f"  goal {case.goal}" if case.goal else ""
        print(f"  {'':36} {name} / {ours}: {ratio:.2f} ({low:.2f} to {high:.2f}){goal}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
