"""The model section of a FIT: what its presets share."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

SOFTMAX = {"kind": "softmax", "num_heads": 4}


def fit(
    *,
    width: int,
    pattern: str,
    latents: int,
    local: Mapping[str, Any] = SOFTMAX,
    across: Mapping[str, Any] = SOFTMAX,
    channel: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    **options: Any,
) -> ConfigDict:
    """One local and one global mixer, MLPs of one shape in both, places within a group learnt as in the paper's code.

    Without group_size or groups the model takes what arch.fit_plan proposes for its length.
    """
    return ConfigDict(
        {
            "topology": "fit",
            "width": width,
            "pattern": pattern,
            "latents": latents,
            "parts": {"local": dict(local), "global": dict(across), "mlp": {"kind": "mlp", **(channel or {})}},
            "token_positions": "learned",
            "positions": {"name": "none"},
            "norm": {"name": "layer"},
            "head": dict(head or {"name": "classifier", "pooling": "mean"}),
            **options,
        }
    )
