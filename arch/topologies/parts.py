"""The named parts of a config, and the blocks made of them."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from flax import nnx

from arch.errors import ConfigError, join, unknown
from arch.positions import Rotary
from arch.registry import CHANNEL_MIXERS, MIXERS, NORMS, Choice, Named, Registry
from arch.schema import names_of
from arch.topologies.block import Block, Placement

PartSections = Annotated[Mapping, Named(Choice((MIXERS, CHANNEL_MIXERS), key="kind"))]  # the option `parts`
NormSection = Annotated[Mapping, Choice((NORMS,))]  # the option `norm`


class Parts:
    """What a topology builds from: `parts` are the sections by name, the rest is alike in all blocks."""

    def __init__(
        self,
        parts: Mapping[str, Any],
        *,
        norm: Mapping[str, Any],
        placement: Placement = "pre",
        dropout: float = 0.0,
        parallel: bool = False,
        causal_chunk: int | None = None,  # of causal mixers that know chunks: see arch/mixers/contract.py
        rngs: nnx.Rngs,
    ):
        self.parts, self.norm_section, self.rngs = parts, norm, rngs
        self.placement, self.dropout, self.parallel, self.causal_chunk = placement, dropout, parallel, causal_chunk

    def with_rngs(self, rngs: nnx.Rngs) -> "Parts":
        """The same parts, drawing their parameters from other random numbers."""
        return Parts(
            self.parts,
            norm=self.norm_section,
            placement=self.placement,
            dropout=self.dropout,
            parallel=self.parallel,
            causal_chunk=self.causal_chunk,
            rngs=rngs,
        )

    def require(self, field: str, name: str, registry: Registry) -> None:
        """The part exists and is of that registry, or ConfigError at the field that names it."""
        if name not in self.parts:
            raise unknown(field, name, self.parts, "part")
        kind = self.parts[name]["kind"]
        if kind not in registry:
            raise ConfigError(
                field, f"part {name!r} is of kind {kind!r}, which is no {registry.what}; see {join('parts', name)}"
            )

    def require_modes(self, names: Iterable[str], causal: bool) -> None:
        """Every one of these mixers has the mode."""
        mode = "causal" if causal else "bidirectional"
        for name in dict.fromkeys(names):
            kind = self.parts[name]["kind"]
            if mode not in MIXERS[kind].modes:
                remedy = (
                    "set causal=False"
                    if causal
                    else 'wrap it, {"kind": "bidirectional", "mixer": {...}}, or set causal'
                )
                raise ConfigError(f"parts.{name}.kind", f"{kind} has no {mode} form; choose another mixer, {remedy}")

    def require_rotary(self, names: Iterable[str]) -> None:
        """At least one of these mixers turns queries and keys."""
        kinds = [self.parts[name]["kind"] for name in dict.fromkeys(names)]
        if not any("rotary" in names_of(MIXERS[kind]) for kind in kinds):
            raise ConfigError(
                "positions.name", f"rotary needs a mixer that turns queries and keys; {', '.join(kinds)} do not"
            )

    def mixer(self, name: str, *, width: int, causal: bool, max_length: int, rotary: Rotary | None = None) -> Any:
        return MIXERS.build(
            self.parts[name],
            path=f"parts.{name}",
            key="kind",
            width=width,
            causal=causal,
            rotary=rotary,
            causal_chunk=self.causal_chunk,
            max_length=max_length,
            rngs=self.rngs,
        )

    def channel(self, name: str | None, *, width: int) -> Any | None:
        if name is None:
            return None
        return CHANNEL_MIXERS.build(
            self.parts[name], path=f"parts.{name}", key="kind", width=width, dropout=self.dropout, rngs=self.rngs
        )

    def norm(self, width: int) -> nnx.Module:
        return NORMS.build(self.norm_section, path="norm", width=width, rngs=self.rngs)

    def block(
        self,
        mixer: str,
        channel: str | None,
        *,
        width: int,
        causal: bool,
        max_length: int,
        rotary: Rotary | None = None,
        layer_scale: float | None = None,
        residual_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> Block:
        return Block(
            self.mixer(mixer, width=width, causal=causal, max_length=max_length, rotary=rotary),
            self.channel(channel, width=width),
            lambda: self.norm(width),
            placement=self.placement,
            dropout=self.dropout,
            parallel=self.parallel,
            width=width,
            layer_scale=layer_scale,
            residual_scale=residual_scale,
            drop_path=drop_path,
            rngs=self.rngs,
        )
