"""Ops against PyTorch: milliseconds of a forward and backward pass, float32, as ratios of one run.

    python scripts/bench_ops.py [--rounds 7] [--torch-python PYTHON]

attention against torch.nn.functional.scaled_dot_product_attention, K = V = 64. The sides take turns in processes of
their own. Needs the extra `peers`. Adds a line to results/bench_ops.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import turns

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # B, T, H, K, causal
    "B8 T1000 H4 full": (8, 1000, 4, 64, False),
    "B1 T1024 H8 causal": (1, 1024, 8, 64, True),
    "B1 T2048 H8 causal": (1, 2048, 8, 64, True),
    "B1 T4096 H8 causal": (1, 4096, 8, 64, True),
}


def inputs(name):
    import numpy as np

    batch, length, heads, width, _ = CASES[name]
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, heads, width)).astype(np.float32) for _ in range(4)]  # q, k, v, dy


def archloom_side():
    """(versions, a function (case, times) that runs forward and backward so often; returns the gradients' norms)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from experiments import environment
    from kernels_pallas.attention import attention

    environment.keep_memory()  # as the trainer does

    def make(name):
        q, k, v, dy = map(jnp.asarray, inputs(name))
        causal = CASES[name][-1]
        step = jax.jit(lambda q, k, v: jax.vjp(lambda *a: attention(*a, causal=causal), q, k, v)[1](dy))
        return lambda: jax.block_until_ready(step(q, k, v))

    return {"jax": jax.__version__}, repeated(make)


def torch_side():
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def make(name):
        q, k, v, dy = (torch.from_numpy(a).transpose(1, 2).contiguous() for a in inputs(name))
        leaves = [a.requires_grad_() for a in (q, k, v)]

        def step():
            y = scaled_dot_product_attention(*leaves, is_causal=CASES[name][-1])
            return torch.autograd.grad(y, leaves, dy)

        return step

    return {"torch": torch.__version__}, repeated(make)


def repeated(make):
    import numpy as np

    made = {}

    def run(name, times):
        if name not in made:
            made[name] = make(name)
        for _ in range(times):
            result = made[name]()
        return [float(np.linalg.norm(np.asarray(a, np.float64))) for a in result]

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores for each side")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "bench_ops.jsonl", help="one line is added")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return turns.serve(options.threads, {"archloom": archloom_side, "torch": torch_side}[options.child])
    if turns.torch_missing(options.torch_python):
        return 2
    ours, peer = (
        turns.Side(name, [python, __file__, "--child", name, f"--threads={options.threads}"], options.threads)
        for name, python in (("archloom", sys.executable), ("torch", options.torch_python))
    )
    cases = {name: measure(name, ours, peer, options.rounds) for name in CASES}
    for side in (ours, peer):
        side.close()
    record = {
        "bench": "ops",
        "cases": cases,
        "threads": options.threads,
        **turns.provenance(ours, peer),
    }
    with options.record.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


def measure(name, ours, peer, rounds):
    """Medians over rounds of about half a second a side; the gradients must agree first."""
    norms = [side.run(name, 1)["result"] for side in (ours, peer)]
    difference = max(abs(a - b) / abs(b) for a, b in zip(*norms))
    if not difference < 1e-4:
        raise SystemExit(f"bench_ops: {name}: the gradients differ: {norms}")
    once = max(side.run(name, 2)["seconds"] / 2 for side in (ours, peer))
    times = max(2, round(0.5 / once))
    seconds = {side.name: [] for side in (ours, peer)}
    for _ in range(rounds):
        for side in (ours, peer):
            seconds[side.name].append(side.run(name, times)["seconds"] / times)
    ratios = [theirs / mine for mine, theirs in zip(seconds[ours.name], seconds[peer.name])]
    found = {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}
    ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"{name:20} ms: {found}  ratio {ratio:.2f} ({low:.2f} to {high:.2f})", flush=True)
    return {"milliseconds": found, "ratio": round(ratio, 3), "ratio_range": [round(low, 3), round(high, 3)]}


if __name__ == "__main__":
    sys.exit(main())
