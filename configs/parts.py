"""What configs share: base settings, models, and the step from deep to wide. Plain data; builds nothing."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


class UnknownName(LookupError):
    """A name that no table has; the message of the command line lists `names` and the nearest."""

    def __init__(self, name: str, names: list[str]):
        super().__init__(name)
        self.names = names


class Table(dict[str, Any]):
    """A dict that tells what it has when asked for what it lacks."""

    def __missing__(self, name: str) -> Any:
        raise UnknownName(name, sorted(self))


class Mixers(dict[str, dict[str, Any]]):
    """A mixer's section by name: what is listed, and {"kind": name} for the rest; the registry knows the names.

    A wrapper stands in front with a hyphen: bidirectional-mamba, chunks-softmax, gated-bidirectional-gla.
    """

    def __missing__(self, name: str) -> dict[str, Any]:
        outer, hyphen, inner = name.partition("-")
        return {"kind": outer, "mixer": self[inner]} if hyphen else {"kind": name}


# Where a recipe differs from the constructor's defaults; sizes left out follow the model's width.
MIXERS = Mixers(fourier={"kind": "fourier", "orthonormal": True})


def base(*, task: str, steps: int, batch_size: int, **task_options: Any) -> ConfigDict:
    """An experiment without a model: LRA's optimiser (Adam .9/.98/1e-9, rsqrt after warm-up), one device mesh."""
    return ConfigDict(
        {
            "seed": 0,
            "task": {"name": task, **task_options},
            "model": {},
            "optimizer": {
                "name": "adamw",
                "lr": 0.05,
                "weight_decay": 0.1,
                "schedule": {"name": "rsqrt", "warmup": 1000},
            },
            "train": {"steps": steps, "batch_size": batch_size},
            "mesh": {"data": -1},
        }
    )


def language(*, lr: float, warmup: int) -> dict[str, Any]:
    """The section `optimizer` of language models on bytes: AdamW .9/.95, decay of matrices alone, clipped, cosine."""
    return {
        "name": "adamw",
        "lr": lr,
        "b2": 0.95,
        "weight_decay": 0.1,
        "decay": "matrices",
        "clip": 1.0,
        "schedule": {"name": "cosine", "warmup": warmup},
    }


def metaformer(
    *,
    width: int,
    depth: int,
    mixer: Mapping[str, Any] | None = None,
    mixers: Mapping[str, Mapping[str, Any]] | None = None,
    layers: tuple[str, ...] = ("mixer",),
    channel: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    positions: str = "sinusoid",
    dropout: float = 0.0,
) -> ConfigDict:
    """An isotropic model of one mixer, or of several named ones in the pattern `layers`; pre-norm, CLS classifier."""
    parts = {"mixer": mixer} if mixers is None else mixers
    return ConfigDict(
        {
            "topology": "metaformer",
            "width": width,
            "depth": depth,
            "layers": layers,
            "channel": "mlp",
            "parts": {
                **{name: dict(part or {}) for name, part in parts.items()},
                "mlp": {"kind": "mlp", **(channel or {})},
            },
            "norm": {"name": "layer"},
            "norm_placement": "pre",
            "positions": {"name": positions},
            "dropout": dropout,
            "head": {"name": "classifier", "pooling": "cls", **(head or {})},
        }
    )


def pyramid(
    *,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    stages: tuple[str | tuple[str, ...], ...],
    mixers: Mapping[str, Mapping[str, Any]],
    channel: Mapping[str, Any],
    norm: Mapping[str, Any],
    stem: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    **options: Any,
) -> ConfigDict:
    """A MetaFormer in stages on images, pre-norm; `options` are those of the topology beside these."""
    return ConfigDict(
        {
            "topology": "pyramid",
            "widths": widths,
            "depths": depths,
            "stages": stages,
            "channel": "mlp",
            "parts": {**{name: dict(part) for name, part in mixers.items()}, "mlp": {"kind": "mlp", **channel}},
            "norm": dict(norm),
            "norm_placement": "pre",
            "embedding": {"name": "stem", **(stem or {})},
            "positions": {"name": "none"},
            "head": dict(head or {"name": "classifier", "pooling": "mean"}),
            **options,
        }
    )


def wide(model: ConfigDict, depth: int = 1) -> ConfigDict:
    """The same total number of heads in fewer layers, each head as wide as before. The channel mixer stays as it is.

    Source: Brown et al. 2022, arXiv:2210.00640. Six layers of 8 heads become one layer of 48.
    """
    layers, pattern = model.depth, len(model.layers)
    if layers % depth:
        raise ValueError(f"wide: {layers} layers do not come down to {depth} evenly; use a depth that divides {layers}")
    if depth % pattern or layers % pattern or model.get("layer_overrides"):
        raise ValueError(f"wide: the {pattern} parts must repeat evenly over {layers} layers and over {depth}")
    found = ConfigDict(model.to_dict())
    found.depth = depth
    for name in set(model.layers):
        part = found.parts[name]
        if "num_heads" not in part:
            raise ValueError(
                f"wide: part {name!r} ({part.kind}) has no num_heads; only mixers with heads can be widened"
            )
        if part.get("head_dim") is None:
            part.head_dim = model.width // part.num_heads
        part.num_heads *= layers // depth
        if part.get("kv_heads") is not None:
            part.kv_heads *= layers // depth
    return found
