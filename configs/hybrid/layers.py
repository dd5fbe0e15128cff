"""What stands in which layer: the hybrids by name, for any depth and any sizes of their parts.

delta_net-local   sliding windows in every other layer (DeltaNet's first hybrid, Yang et al. 2024, arXiv:2406.06484)
delta_net-global  full attention in the 2nd and the depth/2 + 1-th layer (its second)
samba             Mamba and sliding windows by turns, an MLP behind each (Ren et al. 2024, arXiv:2406.07522)
jamba             full attention in one of four layers, Mamba in the others; experts in every other layer
                  (Lieber et al. 2024, arXiv:2403.19887, where attention has one layer of eight)
hyena-softmax     Hyena in the first half, attention after it (Zimerman and Wolf 2024, arXiv:2309.13600)
looped            one block run `depth` times (Universal Transformer, Dehghani et al. 2018, arXiv:1807.03819, without
                  its time embedding and its halting)
parallel          mixer and MLP side by side behind one norm (GPT-J; PaLM, Chowdhery et al. 2022, arXiv:2204.02311)
experts           SwiGLU and a mixture of experts by turns (every other layer: GShard, arXiv:2006.16668)
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import parts


def _first_half(depth: int, name: str) -> tuple[tuple[int, str], ...]:
    return tuple((i, name) for i in range(depth // 2))


HYBRIDS = parts.Table(
    {
        "delta_net-local": lambda depth: {"layers": ("delta_net", "local")},
        "delta_net-global": lambda depth: {
            "layers": ("delta_net",),
            "layer_overrides": ((1, "softmax"), (depth // 2, "softmax")),
        },
        "samba": lambda depth: {"layers": ("mamba", "local")},
        "jamba": lambda depth: {"layers": ("mamba", "mamba", "softmax", "mamba"), "channel": ("mlp", "moe")},
        "hyena-softmax": lambda depth: {"layers": ("softmax",), "layer_overrides": _first_half(depth, "hyena")},
        "looped": lambda depth: {"layers": ("softmax",), "depth": 1, "loops": depth},
        "parallel": lambda depth: {"layers": ("softmax",), "parallel": True},
        "experts": lambda depth: {"layers": ("softmax",), "channel": ("swiglu", "moe")},
    }
)


def hybrid(name: str, *, width: int, depth: int, sections: Mapping[str, Mapping[str, Any]], channel: str) -> ConfigDict:
    """The model; `sections` are those of all parts that a hybrid may name, of which the used ones stay."""
    fields = {"channel": channel, "depth": depth, **HYBRIDS[name](depth)}
    channels = fields["channel"] if isinstance(fields["channel"], tuple) else (fields["channel"],)
    overrides = fields.get("layer_overrides", ())
    used = dict.fromkeys((*fields["layers"], *(part for _, part in overrides), *channels))
    model = parts.metaformer(width=width, depth=depth, mixer={}, positions="rotary").to_dict()
    return ConfigDict({**model, **fields, "parts": {part: dict(sections[part]) for part in used}})
