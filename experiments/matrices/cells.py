"""The cells: every registered mixer in every role, as a config; where a plain cell is refused, its remedy as well."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import arch.model  # noqa: F401  fills the registries
from arch.errors import ConfigError, unknown
from arch.registry import MIXERS, TOPOLOGIES
from experiments.matrices import tasks  # noqa: F401  registers the tasks

WIDTH, HEADS, STEPS, BATCH = 16, 2, 20, 16
SMALL: Mapping[str, Any] = {  # options at 16 tokens of width 16, for mixers that have them
    "num_heads": HEADS,
    "block": 4,
    "num_buckets": 2,
    "num_random": 1,
    "num_features": 8,
    "rank": 4,
    "summary": 2,
    "filter_width": 8,
    "shared_dim": 8,
}
LONGER: Mapping[str, Mapping[str, Any]] = {  # what is not the same for all that have the option
    "bigbird": {"block": 2},
    "chunks": {"mixer": {"kind": "softmax", "num_heads": HEADS}, "size": 4},
    "gated": {"mixer": {"kind": "softmax", "num_heads": HEADS}},
    "bidirectional": {"mixer": {"kind": "linear", "num_heads": HEADS}},
    "local": {"block": 4},
    "longformer": {"window": 4},
    "mamba2": {"state_size": 8},
    "reformer": {"chunk": 4},
    "s4d": {"state_size": 8},
    "s5": {"state_size": 8},
    "lru": {"state_size": 8},
}
ROLES: Mapping[str, str] = {
    "metaformer": "every layer of a MetaFormer, bidirectional",
    "wide": "one layer with the heads of four",
    "masformer full": "the full layer of a causal MASFormer, block attention in the other",
    "masformer near": "the near layer of a causal MASFormer, softmax in the other",
    "fit local": "the local layers of a FIT, softmax in the global one",
    "fit global": "the global layer of a FIT, softmax in the local ones",
    "pyramid": "the second stage of a pyramid of two, on images; pooling in the first",
}
CAUSAL = ("masformer full", "masformer near")


@dataclass(frozen=True)
class Cell:
    """A mixer in a role. form: "plain", or a remedy: "bidirectional" wraps it, "causal=False" frees it of causality."""

    mixer: str
    role: str
    form: str = "plain"

    @property
    def name(self) -> str:
        return f"{self.mixer} in {self.role}" + ("" if self.form == "plain" else f" ({self.form})")


def cells(mixers: Iterable[str] = (), roles: Iterable[str] = ()) -> list[Cell]:
    """All cells, or those of some mixers and roles."""
    names, wanted = list(mixers) or MIXERS.names(), list(roles) or list(ROLES)
    for field, given, known, what in (
        ("--mixers", names, MIXERS.names(), "mixer"),
        ("--roles", wanted, list(ROLES), "role"),
    ):
        for name in given:
            if name not in known:
                raise unknown(field, name, known, what)
    return [cell for name in names for role in wanted for cell in forms(name, role)]


def forms(mixer: str, role: str) -> list[Cell]:
    """The plain cell, and the remedied one if the mixer lacks the role's mode."""
    found = [Cell(mixer, role)]
    if ("causal" if role in CAUSAL else "bidirectional") not in MIXERS[mixer].modes:
        found.append(Cell(mixer, role, "causal=False" if role in CAUSAL else "bidirectional"))
    return found


def part(mixer: str, form: str = "plain") -> dict[str, Any]:
    """The mixer's section, small."""
    options = MIXERS.options(mixer)
    found = {
        "kind": mixer,
        **{name: value for name, value in SMALL.items() if name in options},
        **LONGER.get(mixer, {}),
    }
    return {"kind": "bidirectional", "mixer": found} if form == "bidirectional" else found


def config(cell: Cell) -> dict[str, Any]:
    """The experiment of a cell, not yet resolved. Raises ConfigError where the role has no place for the mixer."""
    build = {
        "metaformer": _metaformer,
        "wide": _wide,
        "masformer full": _masformer,
        "masformer near": _masformer,
        "fit local": _fit,
        "fit global": _fit,
        "pyramid": _pyramid,
    }[cell.role]
    model = build(cell)
    model = {
        "norm": {"name": "layer"},
        "positions": {"name": "learned"},
        "head": {"name": "classifier", "pooling": "mean"},
        **model,
        "parts": {**model["parts"], "mlp": {"kind": "mlp", "hidden": 2 * WIDTH}},
    }
    if model["topology"] not in TOPOLOGIES:
        raise unknown("config.model.topology", model["topology"], TOPOLOGIES.names(), "topology")
    return {
        "task": {"name": "matrix_images" if cell.role == "pyramid" else "matrix_tokens"},
        "model": model,
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0, "schedule": {"name": "constant"}},
        "train": {"steps": STEPS, "batch_size": BATCH, "eval_batch_size": 32},
        "mesh": {"data": 1},
    }


def _metaformer(cell: Cell) -> dict[str, Any]:
    return {
        "topology": "metaformer",
        "width": WIDTH,
        "depth": 2,
        "layers": ("mixer",),
        "parts": {"mixer": part(cell.mixer, cell.form)},
    }


def _wide(cell: Cell) -> dict[str, Any]:
    model = _metaformer(cell)
    entry = model["parts"]["mixer"]
    while isinstance(entry.get("mixer"), Mapping):  # a wrapper's heads are those of its mixer
        entry["mixer"] = dict(entry["mixer"])
        entry = entry["mixer"]
    options = MIXERS.options(entry["kind"])
    if "num_heads" not in options:
        raise ConfigError(
            "config.model.parts.mixer", f"{entry['kind']} has no num_heads; only mixers with heads can be widened"
        )
    entry["num_heads"] = 4 * HEADS
    if "head_dim" in options and options["head_dim"].default is None:
        entry["head_dim"] = WIDTH // HEADS
    return {**model, "depth": 1}


def _masformer(cell: Cell) -> dict[str, Any]:
    full, near = {"kind": "softmax", "num_heads": HEADS}, {"kind": "local", "num_heads": HEADS, "block": 4}
    mine = part(cell.mixer)
    return {
        "topology": "masformer",
        "width": WIDTH,
        "depth": 2,
        "num_full": 1,
        "causal": cell.form != "causal=False",
        "parts": {"full": mine, "near": near} if cell.role == "masformer full" else {"full": full, "near": mine},
    }


def _fit(cell: Cell) -> dict[str, Any]:
    softmax = {"kind": "softmax", "num_heads": HEADS}
    mine = part(cell.mixer, cell.form)
    return {
        "topology": "fit",
        "width": WIDTH,
        "pattern": "(1)1(1)",
        "group_size": 8,
        "latents": 4,
        "parts": {"local": mine, "global": softmax} if cell.role == "fit local" else {"local": softmax, "global": mine},
        "cross_heads": HEADS,
    }


def _pyramid(cell: Cell) -> dict[str, Any]:
    mixer = part(cell.mixer, cell.form)
    axes = {"grid_axes": 2} if "grid_axes" in MIXERS.options(mixer["kind"]) else {}  # of one that must know
    return {
        "topology": "pyramid",
        "embedding": {"name": "patches", "size": 1},
        "widths": (WIDTH, WIDTH),
        "depths": (1, 1),
        "stages": ("pooling", "mixer"),
        "parts": {"pooling": {"kind": "pooling"}, "mixer": {**mixer, **axes}},
    }
