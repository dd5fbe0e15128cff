"""MetaFormer in stages: the grid of tokens shrinks and the width grows from one stage to the next.

Source: Yu et al. 2022, arXiv:2111.11418 (PoolFormer) and arXiv:2210.13452 (the MetaFormer baselines).
"""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Annotated, Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError
from arch.registry import CHANNEL_MIXERS, MIXERS, NORMS, TOPOLOGIES, Choice
from arch.schema import NonNegative, Positive, PositiveFloat, Rate
from arch.strided_conv import StridedConv
from arch.topologies.block import Placement
from arch.topologies.metaformer import linear_rates
from arch.topologies.parts import NormSection, Parts, PartSections
from arch.topologies.stack import Stack

NONE = MappingProxyType({"name": "none"})


@TOPOLOGIES.register("pyramid")
class Pyramid(nnx.Module):
    """Stages of residual blocks; before each but the first, a norm and a convolution with a stride.

    Stage s has depths[s] blocks of width widths[s] with the token mixers stages[s]: a part's name, or a pattern of
    names repeated over the stage's blocks. A mixer of sequences reads the stage's grid in row-major order. The papers'
    form has four stages behind the embedding `stem` and halves the grid between them: 56, 28, 14, 7 at 224 pixels.

    drop_path grows linearly over all blocks, from 0 in the first. residual_scale is one for all stages or one for each.
    last_norm: a norm follows the last block; PoolFormer has it, the baselines norm the mean over tokens in their head.
    """

    keeps_tokens = False  # fewer come out than go in

    def __init__(
        self,
        *,
        widths: tuple[Positive, ...],
        depths: tuple[Positive, ...],
        stages: tuple[str | tuple[str, ...], ...],
        channel: str | tuple[str | None, ...] | None = "mlp",  # one for all stages, or one for each
        parts: PartSections,
        norm: NormSection,
        norm_placement: Placement = "pre",
        last_norm: bool = True,
        down_size: Positive = 3,  # the kernel between stages
        down_stride: Positive = 2,
        down_padding: NonNegative = 1,
        down_norm: Annotated[Mapping, Choice((NORMS,))] = NONE,  # before that convolution
        layer_scale: PositiveFloat | None = None,
        residual_scale: PositiveFloat | tuple[PositiveFloat | None, ...] | None = None,
        drop_path: Rate = 0.0,
        scan: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        grid: tuple[int, ...],
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        count = len(widths)
        scales = residual_scale if isinstance(residual_scale, tuple) else (residual_scale,) * count
        channels = channel if isinstance(channel, tuple) else (channel,) * count
        for field, values in (
            ("depths", depths),
            ("stages", stages),
            ("channel", channels),
            ("residual_scale", scales),
        ):
            if len(values) != count:
                raise ConfigError(field, f"{len(values)} stages, but widths has {count}; give each stage one")
        if causal:
            raise ConfigError("causal", "a pyramid mixes neighbours when it shrinks the grid; set causal=False")
        if len(grid) < 2:
            raise ConfigError("topology", "a pyramid shrinks the grid of an image; use the embedding stem or patches")
        built = Parts(parts, norm=norm, placement=norm_placement, dropout=dropout, rngs=rngs)
        patterns = [(entry,) if isinstance(entry, str) else entry for entry in stages]
        for pattern, depth in zip(patterns, depths):
            if not 1 <= len(pattern) <= depth:
                raise ConfigError("stages", f"{pattern} does not fit the stage's depth of {depth}; give 1 to {depth}")
            for name in pattern:
                built.require("stages", name, MIXERS)
        for wanted in filter(None, channels):
            built.require("channel", wanted, CHANNEL_MIXERS)
        rates = linear_rates(drop_path, sum(depths))

        self.downs: nnx.List[Down] = nnx.List([])
        self.stages: nnx.List[Stack] = nnx.List([])
        for i, (width, depth, pattern) in enumerate(zip(widths, depths, patterns)):
            if i:
                down = Down(
                    widths[i - 1],
                    width,
                    norm=down_norm,
                    grid=grid,
                    size=down_size,
                    stride=down_stride,
                    padding=down_padding,
                    rngs=rngs,
                )
                self.downs.append(down)
                grid = down.conv.grid
            self.stages.append(
                Stack(
                    built,
                    [(pattern[j % len(pattern)], channels[i]) for j in range(depth)],
                    width=width,
                    causal=False,
                    max_length=prod(grid),
                    drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                    layer_scale=layer_scale,
                    residual_scale=scales[i],
                    remat=remat,
                    scan=scan,
                )
            )
        self.norm = built.norm(widths[-1]) if last_norm and norm_placement == "pre" else None

    @staticmethod
    def widths(config: Mapping[str, Any]) -> tuple[int, int]:
        """The widths of what goes in and what comes out."""
        if not config["widths"]:
            raise ConfigError("widths", "no stages; give each stage a width")
        return config["widths"][0], config["widths"][-1]

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *P E"]:
        if keep is not None or segment_ids is not None:
            raise ConfigError("topology", "a pyramid takes whole images: no padding, no packed sequences")
        for i, stage in enumerate(self.stages):
            if i:
                with jax.named_scope(f"downs/{i - 1}"):
                    x = self.downs[i - 1](x)
            with jax.named_scope(f"stages/{i}"):
                x = stage(x)
        return x if self.norm is None else self.norm(x)


class Down(nnx.Module):
    """conv(norm(x)): from one stage to the next."""

    part = "downsampling"  # in the table of costs

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: Mapping[str, Any],
        grid: tuple[int, ...],
        size: int,
        stride: int,
        padding: int,
        rngs: nnx.Rngs,
    ):
        self.norm = NORMS.build(norm, path="down_norm", width=inputs, rngs=rngs)
        self.conv = StridedConv(
            inputs, outputs, grid=grid, size=size, stride=stride, padding=padding, option="down_", rngs=rngs
        )

    def __call__(self, x: Float[Array, "B *A D"]) -> Float[Array, "B *P E"]:
        return self.conv(self.norm(x))
