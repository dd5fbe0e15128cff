"""MASFormer: mixed attention spans, every token seen in a few layers and near ones only in the rest.

Source: Zhang et al. 2023, arXiv:2310.12442. With full attention in l of N layers and blocks of w tokens in the others,
the score entries of T tokens come to the share l / N + (1 - l / N) w / T of those of a model that is full everywhere:
0.27 for l = 4, N = 24, w = 1024, T = 8192.

Differences from the paper: any pair of mixers may hold the two roles, and the layers may be bidirectional. The paper
has causal softmax attention in both, block sparse or with a sliding window in the near layers.
"""

from typing import Literal

from flax import nnx

from arch.errors import ConfigError
from arch.positions import Rotary
from arch.registry import CHANNEL_MIXERS, MIXERS, TOPOLOGIES
from arch.schema import NonNegative, Positive
from arch.topologies.block import Placement
from arch.topologies.parts import NormSection, Parts, PartSections
from arch.topologies.stack import Stack

Where = tuple[int, ...] | Literal["first", "last", "middle", "even"]


@TOPOLOGIES.register("masformer")
class MASFormer(Stack):
    """`depth` residual blocks of one width; `num_full` of them hold the mixer parts[full], the others parts[near].

    where says which are full: the first or last of them, those in the middle, an even spread, or the layers by index,
    negative ones counted from the last. channel names the channel mixer of every layer, None for mixers that need none.
    scan stacks the parameters of each run of layers alike and compiles it once: two runs where the full layers are the
    first or the last. With norm_placement "pre" a last norm follows the blocks.
    """

    def __init__(
        self,
        *,
        width: Positive,
        depth: Positive,
        num_full: NonNegative | None = None,  # None: as many as `where` lists
        where: Where = "first",
        full: str = "full",  # the part of the full layers
        near: str = "near",
        channel: str | None = "mlp",
        parts: PartSections,
        norm: NormSection,
        norm_placement: Placement = "pre",
        scan: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        rotary: Rotary | None = None,
        max_length: int,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.width = width
        self.full_layers = full_layers(depth, num_full, where)
        made = Parts(parts, norm=norm, placement=norm_placement, dropout=dropout, rngs=rngs)
        made.require("full", full, MIXERS)
        made.require("near", near, MIXERS)
        if channel is not None:
            made.require("channel", channel, CHANNEL_MIXERS)
        mixers = [full if i in self.full_layers else near for i in range(depth)]
        if rotary is not None:
            made.require_rotary(mixers)
        super().__init__(
            made,
            [(mixer, channel) for mixer in mixers],
            width=width,
            causal=causal,
            max_length=max_length,
            rotary=rotary,
            remat=remat,
            scan=scan,
            last_norm=True,
        )


def full_layers(depth: int, num_full: int | None, where: Where) -> tuple[int, ...]:
    """The indices of the full layers, in order.

    "middle" leaves as many layers before as behind, or one fewer before; "even" takes the middle layer of each of
    num_full equal parts of the depth: 3, 9, 15, 21 for 4 of 24.
    """
    if isinstance(where, tuple):
        for index in where:
            if not -depth <= index < depth:
                raise ConfigError("where", f"there is no layer {index}; depth is {depth}")
        chosen = tuple(sorted({index % depth for index in where}))
        if len(chosen) < len(where):
            raise ConfigError("where", f"{where} names a layer twice; name each once")
        if num_full is not None and num_full != len(where):
            raise ConfigError("num_full", f"{num_full}, but where lists {len(where)} layers; leave num_full None")
        return chosen
    if num_full is None:
        raise ConfigError("num_full", f"missing; where={where!r} needs a number from 0 to depth {depth}")
    if num_full > depth:
        raise ConfigError("num_full", f"{num_full} of {depth} layers cannot be full; use 0 to {depth}")
    start = {"first": 0, "last": depth - num_full, "middle": (depth - num_full) // 2}
    if where in start:
        return tuple(range(start[where], start[where] + num_full))
    return tuple((2 * i + 1) * depth // (2 * num_full) for i in range(num_full))
