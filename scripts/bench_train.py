"""Training steps per second of one model, in Archloom and in PyTorch eager, on the same cores in one run.

    python scripts/bench_train.py [--rounds 7] [--steps 4] [--torch-python PYTHON]

The model is Long Range Arena's text base: bytes (258 ids), length 1000 and a CLS token, 4 layers, width 256, 4 heads of
64, MLP 1024, float32, batch 8, Adam. Both sides start from the same parameters and batches; their losses over the first
steps must agree, else nothing is timed. Each side is a process of its own (the two libraries' thread pools do not share
one well); they take turns, the other one idle. The ratio is the median over rounds of ours to PyTorch's steps per
second. Processor seconds a step stand beside it: on a busy machine they are the steadier figure.

Needs the extra `peers`: pip install -e '.[peers]' (or --torch-python, an interpreter that has torch).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import turns

ROOT = Path(__file__).resolve().parent.parent
VOCAB, CLASSES, LENGTH, BATCH = 258, 2, 1000, 8
WIDTH, DEPTH, HEADS, INNER, HIDDEN = 256, 4, 4, 1024, 1024
LR, BETAS, EPS = 1e-4, (0.9, 0.98), 1e-9
BATCHES = 4  # different ones, used in turn


def batches():
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        {
            "inputs": rng.integers(1, VOCAB, (BATCH, LENGTH)).astype(np.int32),  # no padding: SDPA then needs no mask
            "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        }
        for _ in range(BATCHES)
    ]


def archloom_side(parameters: str, threads: int):
    """Writes the first parameters to a file; yields versions, then a function that runs n steps."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np

    import arch
    from arch.model import functional
    from arch.spec import InputSpec
    from configs import parts
    from experiments import environment, optim, step

    environment.keep_memory()  # as the trainer does
    mixer = {"kind": "softmax", "num_heads": HEADS}
    config = parts.metaformer(width=WIDTH, depth=DEPTH, mixer=mixer, channel={"hidden": INNER}, head={"hidden": HIDDEN})
    model = functional(config.to_dict(), InputSpec(VOCAB, CLASSES, LENGTH))
    adam = optim.adam(b1=BETAS[0], b2=BETAS[1], eps=EPS)
    optimizer = optim.Optimizer(adam, lambda _: LR, clip=None, accumulate=1, ema=None)
    state = step.init_state(jnp.uint32(0), init=model.init, optimizer=optimizer, latch=False)
    flat, _ = jax.tree_util.tree_flatten_with_path(state["params"])
    np.savez(parameters, **{"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat})
    run = jax.jit(
        lambda state, batch: step.train_step(state, batch, apply=model.apply_with_losses, optimizer=optimizer),
        donate_argnums=0,
    )
    data = [{**b, "keep": np.ones((BATCH, LENGTH), bool), "weight": np.ones(BATCH, np.float32)} for b in batches()]
    metrics = []

    def steps(first, count):
        nonlocal state
        for n in range(first, first + count):
            state, vector = run(state, data[n % BATCHES])
            metrics.append(vector)
        values = [float(vector[0]) for vector in metrics]  # waits for the last step
        metrics.clear()
        return values

    return {"archloom": arch.__version__, "jax": jax.__version__, "jaxlib": jax.lib.__version__}, steps


def torch_side(parameters: str, threads: int):
    """The same model by hand."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x):
            shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
            q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.cls = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(WIDTH))
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH, eps=1e-6)
            self.hidden, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)
            angle = torch.arange(LENGTH + 1)[:, None] * 10_000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
            self.register_buffer("sinusoid", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))

        def forward(self, inputs):
            x = torch.cat([self.cls.expand(len(inputs), 1, -1), self.embed(inputs)], 1) + self.sinusoid
            for block in self.blocks:
                x = block(x)
            return self.head(F.relu(self.hidden(self.norm(x)[:, 0])))

    model = Model()
    names = {"cls": "cls", "embed.weight": "embed/embedding"}
    for mine, theirs in {"norm": "topology/norm", "hidden": "head/hidden", "head": "head/out"}.items():
        names |= _both(mine, theirs)
    for i in range(DEPTH):
        theirs = f"topology/blocks/{i}/"
        names[f"blocks.{i}.qkv.weight"] = theirs + "mixer/qkv/kernel"
        names[f"blocks.{i}.out.weight"] = theirs + "mixer/out/kernel"
        pairs = {"norm1": "mix/norm", "norm2": "transform/norm", "up": "channel/up", "down": "channel/down"}
        for mine, part in pairs.items():
            names |= _both(f"blocks.{i}.{mine}", theirs + part)
    with np.load(parameters) as saved, torch.no_grad():
        own = dict(model.named_parameters())
        if sorted(names) != sorted(own) or sorted(names.values()) != sorted(saved.files):
            raise SystemExit(f"the models differ in their parameters: {sorted(saved.files)}")
        for name, parameter in own.items():
            value = torch.from_numpy(saved[names[name]])
            parameter.copy_(value.T if names[name].endswith("kernel") else value)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    data = [(torch.from_numpy(b["inputs"]).long(), torch.from_numpy(b["label"]).long()) for b in batches()]

    def steps(first, count):
        losses = []
        for n in range(first, first + count):
            inputs, label = data[n % BATCHES]
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(inputs), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    return {"torch": torch.__version__}, steps


def _both(mine, theirs):
    first = "scale" if theirs.endswith("norm") else "kernel"
    return {mine + ".weight": f"{theirs}/{first}", mine + ".bias": f"{theirs}/bias"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (at least 5 for a record)")
    parser.add_argument("--steps", type=int, default=4, help="training steps a turn")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores for each side")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "bench_train.jsonl", help="one line is added")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--parameters", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        start = {"archloom": archloom_side, "torch": torch_side}[options.child]
        return turns.serve(options.threads, lambda: start(options.parameters, options.threads))
    if turns.torch_missing(options.torch_python):
        return 2
    with tempfile.TemporaryDirectory() as folder:
        parameters = str(Path(folder) / "parameters.npz")
        sides = []
        for name, python in (("archloom", sys.executable), ("torch", options.torch_python)):
            command = [python, __file__, "--child", name, "--parameters", parameters, f"--threads={options.threads}"]
            sides.append(turns.Side(name, command, options.threads))
        return compare(options, *sides)


def compare(options, ours: turns.Side, peer: turns.Side):
    first = [side.run(0, BATCHES) for side in (ours, peer)]  # compiles; not timed
    difference = max(abs(a - b) / abs(b) for a, b in zip(*(turn["result"] for turn in first)))
    print(f"losses of the first {BATCHES} steps agree to {difference:.1e}")
    if not difference < 1e-3:
        print(f"bench_train: the two models are not the same: {first}", file=sys.stderr)
        return 1
    rounds, done, processor = [], BATCHES, {ours.name: [], peer.name: []}
    for n in range(options.rounds):
        turn = {}
        for side in (ours, peer):
            answer = side.run(done, options.steps)
            turn[side.name] = options.steps / answer["seconds"]
            processor[side.name].append(answer["processor"] / options.steps)
        rounds.append(turn)
        done += options.steps
        print(
            f"round {n + 1}: archloom {turn['archloom']:.3f}  torch {turn['torch']:.3f} steps/s"
            f"  ratio {turn['archloom'] / turn['torch']:.2f}  processor seconds a step"
            f" {processor['archloom'][-1]:.2f} and {processor['torch'][-1]:.2f}"
        )
    for side in (ours, peer):
        side.close()
    ratios = [turn["archloom"] / turn["torch"] for turn in rounds]
    speeds = {name: statistics.median(turn[name] for turn in rounds) for name in rounds[0]}
    record = {
        "bench": "train_step",
        "model": f"LRA text base: depth {DEPTH}, width {WIDTH}, heads {HEADS}, length {LENGTH}, batch {BATCH}, fp32",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "steps_per_second": {name: round(speed, 4) for name, speed in speeds.items()},
        "rounds": [{name: round(speed, 4) for name, speed in turn.items()} for turn in rounds],
        "steps_a_round": options.steps,
        "processor_seconds_a_step": {name: round(statistics.median(spent), 4) for name, spent in processor.items()},
        "loss_difference": difference,
        "threads": options.threads,
        **turns.provenance(ours, peer),
    }
    options.record.parent.mkdir(parents=True, exist_ok=True)
    with options.record.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(
        f"median: archloom {speeds['archloom']:.3f}, torch {speeds['torch']:.3f} steps/s, "
        f"ratio {record['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); added to {options.record}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
