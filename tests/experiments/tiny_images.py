"""Images so small that a diffusion run takes a second: one of three colours, brighter towards one side.

As a program (python -m tests.experiments.tiny_images ...) it is experiments.train with this task; see tiny.py.
"""

import os
import sys

import numpy as np
from ml_collections import ConfigDict

from arch.registry import TASKS
from arch.spec import ImageSpec
from tests.experiments import tiny

SIDE, CLASSES = 8, 3


class Pictures:
    def __init__(self, size, seed):
        rng = np.random.default_rng(seed)
        self.label = rng.integers(0, CLASSES, size).astype(np.int32)
        color = np.eye(CLASSES, 3)[self.label][:, None, None]
        ramp = np.linspace(0.5, 1, SIDE)[None, None, :, None]
        self.inputs = ((color * ramp + 0.05 * rng.normal(size=(size, SIDE, SIDE, 3)) - 0.25) / 0.35).astype(np.float32)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "label": self.label[index]}


class TinyImages:
    metric, chance, token_labels, content_hash = "accuracy", 1 / CLASSES, False, "none"

    def __init__(self):
        self.splits = {"train": 64, "validation": 20, "test": 12}
        self.spec = ImageSpec(SIDE, SIDE, 3, CLASSES)
        self.mean, self.std = np.full(3, 0.25, np.float32), np.full(3, 0.35, np.float32)
        self._sources = {name: Pictures(size, i) for i, (name, size) in enumerate(self.splits.items())}

    def prepare(self):
        pass

    def source(self, split):
        return self._sources[split]

    def majority(self, split):
        return float(np.bincount(self._sources[split].label).max() / self.splits[split])


if "tiny_images" not in TASKS:
    TASKS.register("tiny_images")(TinyImages)


def get_config(objective: str = "flow_matching"):
    config = ConfigDict(tiny.get_config().to_dict())
    config.task = {"name": "tiny_images"}
    config.objective = {"name": objective}
    config.model.embedding = {"name": "patches", "size": 2}
    config.model.width = 16
    config.model.head = {"name": "denoiser", "features": 8}
    config.optimizer.ema = 0.9
    return config


def config(objective: str = "flow_matching", **overrides):
    """The resolved config; overrides by dotted path, "." written as "__"."""
    from experiments import config as configs

    tree = configs.plain(get_config(objective))
    configs.apply(tree, {path.replace("__", "."): value for path, value in overrides.items()})
    return configs.resolve(tree)


if __name__ == "__main__":
    from experiments import cli, train

    if "TINY_KILL" in os.environ:
        tiny.kill_at(int(os.environ["TINY_KILL"]))
    sys.exit(cli.command(train.main)(None))
