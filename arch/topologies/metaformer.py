"""MetaFormer, isotropic: equal blocks of a token mixer and a channel mixer.

Source: Yu et al. 2022, arXiv:2111.11418.
"""

from flax import nnx

from arch.errors import ConfigError
from arch.positions import Rotary
from arch.registry import CHANNEL_MIXERS, MIXERS, TOPOLOGIES
from arch.schema import Positive, PositiveFloat, Rate
from arch.topologies.block import Placement
from arch.topologies.parts import NormSection, Parts, PartSections
from arch.topologies.stack import Stack


@TOPOLOGIES.register("metaformer")
class MetaFormer(Stack):
    """`depth` residual blocks of one width. Layer i holds the token mixer parts[layers[i mod len(layers)]].

    layers is a pattern repeated over depth; layer_overrides then replaces single layers, ((index, part), ...), negative
    indices counting from the last. channel names the channel mixer of every layer, or a pattern of them repeated over
    depth; None for mixers that need none. With norm_placement "pre" a last norm follows the blocks.

    parallel, layer_scale and drop_path are those of the block, drop_path growing linearly from 0 in the first layer;
    loops and scan those of the stack: the row of blocks run several times, and its repeated layers as one loop.
    """

    def __init__(
        self,
        *,
        width: Positive,
        depth: Positive,
        layers: tuple[str, ...],
        layer_overrides: tuple[tuple[int, str], ...] = (),
        channel: str | tuple[str | None, ...] | None = "mlp",
        parts: PartSections,
        norm: NormSection,
        norm_placement: Placement = "pre",
        parallel: bool = False,  # mixer and channel mixer side by side
        layer_scale: PositiveFloat | None = None,  # what the learnt factors of the branches start from
        drop_path: Rate = 0.0,  # of the last layer's branches, left out for an example
        loops: Positive = 1,
        scan: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        rotary: Rotary | None = None,
        max_length: int,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.width = width
        made = Parts(parts, norm=norm, placement=norm_placement, dropout=dropout, parallel=parallel, rngs=rngs)
        self.parts_of_layers = pattern(layers, layer_overrides, depth)
        for i, name in enumerate(self.parts_of_layers):
            field = "layers" if i >= len(layers) or layers[i] == name else "layer_overrides"
            made.require(field, name, MIXERS)
        channels = channel_pattern(channel, depth)
        for each in channels:
            if each is not None:
                made.require("channel", each, CHANNEL_MIXERS)
        if parallel and (norm_placement == "post" or None in channels):
            raise ConfigError("parallel", "needs norm_placement pre and a channel mixer in every layer")
        if rotary is not None:
            made.require_rotary(self.parts_of_layers)
        super().__init__(
            made,
            list(zip(self.parts_of_layers, channels)),
            width=width,
            causal=causal,
            max_length=max_length,
            rotary=rotary,
            drop_path=linear_rates(drop_path, depth),
            layer_scale=layer_scale,
            remat=remat,
            scan=scan,
            loops=loops,
            last_norm=True,
        )


def pattern(layers: tuple[str, ...], overrides: tuple[tuple[int, str], ...], depth: int) -> list[str]:
    """The part name of each of `depth` layers."""
    if not 1 <= len(layers) <= depth:
        raise ConfigError("layers", f"a pattern of {len(layers)} parts does not fit depth {depth}; give 1 to {depth}")
    names = [layers[i % len(layers)] for i in range(depth)]
    for index, name in overrides:
        if not -depth <= index < depth:
            raise ConfigError("layer_overrides", f"there is no layer {index}; depth is {depth}")
        names[index] = name
    return names


def channel_pattern(channel: str | tuple[str | None, ...] | None, depth: int) -> list[str | None]:
    """The channel mixer of each of `depth` layers; a name alone stands for all of them."""
    names = channel if isinstance(channel, tuple) else (channel,)
    if not 1 <= len(names) <= depth:
        raise ConfigError("channel", f"a pattern of {len(names)} parts does not fit depth {depth}; give 1 to {depth}")
    return [names[i % len(names)] for i in range(depth)]


def linear_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth: 0 in the first of `depth` layers, `last` in the last, a straight line between."""
    return [last * i / max(depth - 1, 1) for i in range(depth)] if last else []
