"""Pairs and images over several devices: the same losses as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "topology": "metaformer", "width": 8, "depth": 1, "layers": ("mixer",), "channel": "mlp",
    "parts": {"mixer": {"kind": "softmax", "num_heads": 2}, "mlp": {"kind": "mlp", "hidden": 16}},
    "norm": {"name": "layer"}, "positions": {"name": "sinusoid"},
}  # fmt: skip
MODELS = {
    "pairs": {**MODEL, "head": {"name": "matching", "hidden": 8, "pooling": "cls"}},
    "images": {
        **MODEL, "head": {"name": "classifier", "pooling": "mean"}, "embedding": {"name": "patches", "size": 4},
    },
}  # fmt: skip

PROGRAM = """
import json, sys
import jax, numpy as np
from arch.registry import TASKS
from arch.spec import ImageSpec, InputSpec
from experiments import config, environment
from experiments.program import Program

environment.compile_cache()
SPECS = {"pairs": InputSpec(9, num_classes=3, length=6, pair=True), "images": ImageSpec(8, 8, 2, num_classes=3)}


class Drawn:
    metric, chance, token_labels, content_hash = "accuracy", 1 / 3, False, "none"
    splits = {"train": 32, "validation": 10}

    def __init__(self, *, kind: str):
        self.spec = SPECS[kind]
        rng = np.random.default_rng(0)
        rows = rng.integers(0, 9, (32, *self.spec.shape)).astype(self.spec.dtype)
        self.rows = [{"inputs": row, "label": np.int32(i % 3)} for i, row in enumerate(rows)]

    def prepare(self):
        pass

    def source(self, split):
        return self.rows[: self.splits[split]]


TASKS.register("drawn")(Drawn)
kind, model = sys.argv[1], json.loads(sys.argv[2])
for sizes in json.loads(sys.argv[3]):
    made = config.resolve({
        "task": {"name": "drawn", "kind": kind},
        "model": model,
        "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": {"name": "constant"}, "accumulate": 2},
        "train": {"steps": 3, "batch_size": 16},
        "mesh": {"data": 1, **sizes},
    })
    program = Program(made, jax.devices()[: int(np.prod(list(sizes.values())))])
    losses = []
    with jax.set_mesh(program.mesh):
        state, batches = program.init(), program.batches()
        for _ in range(3):
            state, values = program.train_step(state, program.put(next(batches)))
            losses.append(np.asarray(values).tolist())
        batches.close()
        losses.append([program.evaluate(state["params"], "validation")["loss"]] * len(losses[0]))
    print(json.dumps(losses))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "meshes"),
    [
        ("pairs", [{"data": 1}, {"data": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2}]),
        ("images", [{"data": 1}, {"data": 2, "tensor": 2}]),
    ],
)
def test_four_devices_equal_one(kind, meshes):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, json.dumps(MODELS[kind]), json.dumps(meshes)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = [np.array(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(others) == len(meshes) - 1
    assert one[0, 0] > one[2, 0]
    for found in others:
        np.testing.assert_allclose(found, one, rtol=1e-4)  # sums in another order
