"""The weights of every mixer that has them, taken while the model runs on one example."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from arch.errors import ConfigError
from arch.registry import MIXERS
from arch.topologies.stack import Repeated


@dataclass(frozen=True)
class Layer:
    """One call of one mixer."""

    path: str  # "topology/blocks/0/mixer"
    kind: str  # its name in the registry
    weights: np.ndarray  # float32 [rows H T S]


class Watched:
    """Stands in a mixer's place: the same calls, and the weights of each are kept."""

    def __init__(self, mixer: Any, path: str, kind: str, layers: list[Layer]):
        self._mixer, self._path, self._kind, self._layers = mixer, path, kind, layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mixer, name)

    def __call__(self, x: jax.Array, *, keep: jax.Array | None = None, **masks: Any) -> jax.Array:
        weights = np.asarray(self._mixer.weights(x, keep=keep), np.float32)
        self._layers.append(Layer(self._path, self._kind, weights))
        return self._mixer(x, keep=keep, **masks)


def watch(model: nnx.Module) -> tuple[list[Layer], list[str]]:
    """A list that the model's next call fills, in order, and the names of the mixers that have no weights."""
    found: list[Layer] = []
    without: list[str] = []
    modules = [("/".join(map(str, keys)), module) for keys, module in nnx.iter_modules(model)]
    for path, module in modules:
        if isinstance(module, Repeated):
            raise ConfigError("config.model.scan", f"{path} holds its layers in one loop; maps need scan=False")
    mixers = {path: module for path, module in modules if MIXERS.name_of(type(module)) is not None}
    for path, mixer in sorted(mixers.items(), key=lambda item: item[0]):
        kind = MIXERS.name_of(type(mixer))
        assert kind is not None
        if any(path.startswith(f"{other}/") for other in mixers):
            continue  # inside a wrapper, which speaks for it
        if not hasattr(mixer, "weights"):
            without.append(f"{kind} ({path})")
            continue
        owners = [module for _, module in modules if any(value is mixer for value in vars(module).values())]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if value is mixer:
                    object.__setattr__(owner, name, Watched(mixer, path, kind, found))
    if without and len(without) == sum(not any(p.startswith(f"{o}/") for o in mixers) for p in mixers):
        names = ", ".join(sorted(name for name in MIXERS.names() if hasattr(MIXERS[name], "weights")))
        raise ConfigError("config.model.parts", f"no attention weights: {', '.join(without)}; those with: {names}")
    return found, without


def reading_row(weights: np.ndarray, keep: np.ndarray, pooling: str | None) -> np.ndarray:
    """[H S] of [H T S]: the row that the head reads: of the CLS token, the mean row or that of the last token."""
    if pooling == "cls":
        return weights[:, 0]
    if pooling == "mean":
        return weights[:, keep].mean(axis=1)
    return weights[:, int(np.flatnonzero(keep)[-1])]
