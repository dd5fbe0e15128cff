"""FIT: tokens in groups, a few latents for each group, and layers by turns inside the groups and across them.

Source: Chen and Li 2023, arXiv:2305.12689; details from the authors' TensorFlow code (google-research/pix2seq,
architectures/transformers.py).
"""

from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch import fit_plan
from arch.errors import ConfigError
from arch.mixers.contract import State
from arch.positions import Rotary
from arch.registry import CHANNEL_MIXERS, MIXERS, TOPOLOGIES
from arch.schema import Positive
from arch.topologies import groups as grouping
from arch.topologies.block import Placement
from arch.topologies.cross import Cross
from arch.topologies.parts import NormSection, Parts, PartSections
from arch.topologies.stack import REMAT, Layer, Stack, repeats

Sizes = Positive | tuple[Positive, ...]  # of a sequence, or one a token axis


class Level(nnx.Module):
    """Local layers; then, where there are global layers, a read, those layers and, unless it is the last, a write."""

    def __init__(self, local: Stack | None, read: Cross | None, latent: Stack | None, write: Cross | None):
        self.local, self.read, self.latent, self.write = local, read, latent, write


@TOPOLOGIES.register("fit")
class FIT(nnx.Module):
    """Groups of n tokens x_g[n D] and of m latents z_g[m E], z_g a learnt vector each at first; then, by `pattern`,

        local    x_g <- local layers over the tokens of group g                          O(L n) scores a layer
        read     z_g <- z_g + attention(z_g to x_g)                                      O(L m)
        global   z   <- global layers over the latents of all groups, z[L/n m, E]        O((L m / n)^2)
        write    x_g <- x_g + attention(x_g to z_g)                                      O(L m)

    "(2)4(2)" is 2 local layers, read, 4 global layers, write, 2 local layers; "(2)4" ends with the latents. The parts
    of local_parts are repeated over the local layers of all runs, those of global_parts over the global ones.

    A sequence is cut into runs of tokens, a grid into boxes, whose mixers then see a grid; a last group that is too
    short is filled up with places that nothing reads. Sizes: group_size or groups, one number for a sequence and one a
    token axis for a grid; with neither, those of arch.fit_plan.propose. A group of padding alone leaves no trace.

    output: "tokens" gives the tokens back, in the shape in which they came; "latents" all latents [B P*m E], for a
    pattern that ends with global layers.

    causal: no token sees a later one. Local layers are causal; a group's latents see each other and those of former
    groups; and the tokens of group g read the latents of group g - 1, those of the first group none. A mixer that
    cannot let the latents of a group see each other (`causal_chunk`, arch/mixers/contract.py) sees former latents only:
    less, never more. A group's latents are computed once its last token is there (init_state, step).

    Differences from the paper's code: the projections of attention have no biases; the first group reads nothing, where
    the code has it read vectors of zeros, which its biases turn into a learnt vector; cross-attention has cross_heads
    heads, where the code takes the fewer of the two sides'; positions are the model's, or token_positions="learned" for
    the code's, one vector for every place of a group, the same in all groups.
    """

    def __init__(
        self,
        *,
        width: Positive,  # D, of the tokens
        latent_width: Positive | None = None,  # E; None: width
        pattern: str = "(2)4(2)",
        groups: Sizes | None = None,
        group_size: Sizes | None = None,  # n, or its sides
        latents: Positive = fit_plan.LATENTS,  # m, a group
        local_parts: tuple[str, ...] = ("local",),
        global_parts: tuple[str, ...] = ("global",),
        local_channel: str | None = "mlp",
        global_channel: str | None = "mlp",
        cross_heads: Positive = 4,
        output: Literal["tokens", "latents"] = "tokens",
        token_positions: Literal["none", "learned"] = "none",
        parts: PartSections,
        norm: NormSection,
        norm_placement: Placement = "pre",
        scan: bool = False,  # each run of layers as one loop
        dropout: float = 0.0,
        causal: bool = False,
        rotary: Rotary | None = None,
        max_length: int,
        grid: tuple[int, ...] | None = None,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        axes = (max_length,) if grid is None else grid
        levels = fit_plan.parse(pattern)
        _check_end(pattern, levels, output, causal)
        self.width, self.latent_width = width, latent_width or width
        self.latents, self.causal, self.remat = latents, causal, remat
        self.size = _group_size(axes, groups, group_size, latents, pattern)
        self.keeps_tokens = output == "tokens"
        self.number = prod(grouping.counts(axes, self.size))

        def build(**extra: Any) -> Parts:
            return Parts(parts, norm=norm, placement=norm_placement, dropout=dropout, rngs=rngs, **extra)

        local, across = build(), build(causal_chunk=latents if causal else None)
        for field, names, registry in (
            ("local_parts", local_parts, MIXERS),
            ("global_parts", global_parts, MIXERS),
            ("local_channel", [local_channel], CHANNEL_MIXERS),
            ("global_channel", [global_channel], CHANNEL_MIXERS),
        ):
            if not names:
                raise ConfigError(field, "name at least one part")
            for name in names:
                if name is not None:
                    local.require(field, name, registry)
        if rotary is not None:
            local.require_rotary((*local_parts, *global_parts))
        near = _runs(local_parts, local_channel, [level.local_layers for level in levels])
        far = _runs(global_parts, global_channel, [level.global_layers for level in levels])
        if scan and all(times == 1 for run in (*near, *far) for _, _, times in repeats(run)):
            raise ConfigError("scan", "no layer of any run repeats, so there is nothing to scan over; set scan=False")

        def stack(parts: Parts, layers: list[Layer], width: int, length: int) -> Stack | None:
            again = scan and any(times > 1 for _, _, times in repeats(layers))
            if not layers:
                return None
            given: dict[str, Any] = {"causal": causal, "rotary": rotary, "remat": remat, "scan": again}
            return Stack(parts, layers, width=width, max_length=length, **given)

        def cross(width: int, source_width: int) -> Cross:
            return Cross(local, width=width, source_width=source_width, num_heads=cross_heads, rngs=rngs)

        self.levels: Any = nnx.List([])
        for i, level in enumerate(levels):
            with_latents = level.global_layers > 0
            writes = with_latents and i < len(levels) - 1
            self.levels.append(
                Level(
                    stack(local, near[i], self.width, prod(self.size)),
                    cross(self.latent_width, self.width) if with_latents else None,
                    stack(across, far[i], self.latent_width, self.number * latents),
                    cross(self.width, self.latent_width) if writes else None,
                )
            )
        normal = nnx.initializers.normal(0.02)
        self.start = nnx.Param(normal(rngs.params(), (self.number, latents, self.latent_width)))
        self.places = nnx.Param(normal(rngs.params(), (*self.size, width))) if token_positions == "learned" else None
        self.norm = local.norm(width if self.keeps_tokens else self.latent_width) if norm_placement == "pre" else None

    @staticmethod
    def widths(config: Any) -> tuple[int, int]:
        """Of what comes in and of what leaves."""
        latent = config.get("latent_width") or config["width"]
        return config["width"], latent if config.get("output") == "latents" else config["width"]

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B ... E"]:
        if segment_ids is not None:
            raise ConfigError(
                "segment_ids", "the latents of FIT read whole groups; give each sequence a row of its own"
            )
        batch, *rest = x.shape[:-1]
        axes = tuple(rest)
        number = self._number(axes)

        def rows(a: Array) -> Array:  # the groups as rows of a batch
            return a.reshape(batch * number, *a.shape[2:])

        mask = grouping.cut_keep(keep, batch, axes, self.size)  # [B P *n]
        real = None if mask is None else mask.reshape(batch, number, -1).any(-1)  # [B P], groups with a token
        mask = None if mask is None else rows(mask)
        x = rows(grouping.cut(x, self.size))  # [B*P *n D]
        if self.places is not None:
            x = x + self.places[...].astype(x.dtype)
        z = jnp.broadcast_to(self.start[...][:number].astype(x.dtype), (batch, number, *self.start.shape[1:]))
        for i, level in enumerate(self.levels):
            with jax.named_scope(f"levels/{i}"):
                if level.local is not None:
                    with jax.named_scope("local"):
                        x = level.local(x, keep=mask)
                if level.latent is None:
                    continue
                with jax.named_scope("read"):
                    z = self._cross(level.read, rows(z), x, None if mask is None else mask.reshape(len(mask), -1))
                with jax.named_scope("latent"):
                    z = level.latent(z.reshape(batch, -1, self.latent_width), keep=self._latent_keep(real))
                z = z.reshape(batch, number, self.latents, self.latent_width)
                if level.write is not None:
                    with jax.named_scope("write"):
                        source, seen = self._written(z, real)
                        x = self._cross(level.write, x, rows(source), None if seen is None else rows(seen))
        if self.keeps_tokens:
            x = grouping.join(x.reshape(batch, number, *self.size, self.width), axes, self.size)
        else:
            x = z.reshape(batch, -1, self.latent_width)
        return x if self.norm is None else self.norm(x)

    def diagram(self) -> dict[str, Any]:
        """How a drawing tells tokens and latents apart; docs/structure.md has the contract."""
        of = {"local": "tokens", "latent": "latents", "places": "tokens", "start": "latents"}
        return {
            "lanes": ("tokens", "latents"),
            "of": {**of, "read": ("tokens", "latents"), "write": ("latents", "tokens")},
            "titles": {"start": "latents at first", "places": "places in a group"},
        }

    def kept(self, keep: Bool[Array, "B *A"]) -> Bool[Array, "B ..."]:
        """Which of the tokens that leave are real."""
        if self.keeps_tokens:
            return keep
        mask = grouping.cut(keep, self.size)
        return jnp.repeat(mask.reshape(*mask.shape[:2], -1).any(-1), self.latents, axis=1)

    def _number(self, axes: tuple[int, ...]) -> int:
        number = prod(grouping.counts(axes, self.size))
        if number > self.number:
            raise ConfigError("max_length", f"FIT was built for {self.number} groups; {axes} tokens make {number}")
        return number

    def _cross(self, cross: Cross, x: Array, source: Array, keep: Array | None) -> Array:
        """x[R ... D] reads source[R ... E]; the token axes are laid out in a row meanwhile."""
        graph, leaves = nnx.split(cross)

        def read(leaves: Any, x: Array, source: Array) -> Array:
            return nnx.merge(graph, leaves)(x, source=source, keep=keep)

        policy = REMAT[self.remat]
        read = read if policy is None else jax.checkpoint(read, policy=policy)
        flat = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (x, source))
        return read(leaves, *flat).reshape(x.shape)

    def _latent_keep(self, real: Array | None) -> Array | None:
        return None if real is None else jnp.repeat(real, self.latents, axis=1)

    def _written(self, z: Array, real: Array | None) -> tuple[Array, Array | None]:
        """The latents that each group's tokens read, and which of them are there: [B P m E], [B P m] or None."""
        batch, number = z.shape[:2]
        if self.causal:  # those of the group before
            z = jnp.pad(z, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
            real = jnp.ones((batch, number), bool) if real is None else real
            real = jnp.pad(real, [(0, 0), (1, 0)])[:, :-1]
        seen = None if real is None else jnp.broadcast_to(real[..., None], (batch, number, self.latents))
        return z, seen

    def init_state(self, batch: int, max_length: int) -> State:
        """Beside the mixers' states: the tokens of the group so far, and the latents of the group before, by level."""
        if not self.causal:
            raise ConfigError("causal", "only a causal FIT decodes; set causal")
        number, dtype = self._number((max_length,)), self.start.dtype
        tokens = jnp.zeros((batch, *self.size, self.width), dtype)
        before = jnp.zeros((batch, self.latents, self.latent_width), dtype)
        inside = [level for level in self.levels if level.latent is not None]
        return {
            "group": jnp.zeros((), jnp.int32),
            "place": jnp.zeros((), jnp.int32),  # in the group
            "local": self._local_states(batch),
            "tokens": [tokens for _ in inside],
            "latent": [level.latent.init_state(batch, number * self.latents) for level in inside],
            "before": [before for _ in inside],
        }

    def _local_states(self, batch: int) -> list[Any]:
        return [None if each.local is None else each.local.init_state(batch, self.size[0]) for each in self.levels]

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One more token; with the last of a group its latents too, in time for the next."""
        batch, place, group = x.shape[0], state["place"], state["group"]
        local: list[Any] = []
        tokens: list[Array] = []
        if self.places is not None:
            x = x + self.places[...][place].astype(x.dtype)
        for level, inner in zip(self.levels, state["local"]):
            if level.local is not None:
                x, inner = level.local.step(x, inner)
            local.append(inner)
            if level.latent is None:
                continue
            tokens.append(state["tokens"][len(tokens)].at[:, place].set(x))
            if level.write is not None:
                source = state["before"][len(tokens) - 1]
                seen = jnp.broadcast_to(group > 0, source.shape[:2])
                x = level.write(x[:, None], source=source, keep=seen)[:, 0]

        def finish(latent: list[Any], before: list[Array]) -> tuple[list[Any], list[Array]]:
            z = jnp.broadcast_to(self.start[...][group], (batch, *self.start.shape[1:]))
            inside, states, after = [level for level in self.levels if level.latent is not None], [], []
            for level, given, mine in zip(inside, latent, tokens):
                z, found = level.latent.step(level.read(z, source=mine), given)
                states.append(found)
                after.append(z)
            return states, after

        last = place + 1 == self.size[0]
        latent, before = jax.lax.cond(last, finish, lambda *same: same, state["latent"], state["before"])
        local = jax.tree.map(lambda fresh, old: jnp.where(last, fresh, old), self._local_states(batch), local)
        after = {"group": group + last, "place": jnp.where(last, 0, place + 1), "local": local}
        after |= {"tokens": tokens, "latent": latent, "before": before}
        return x if self.norm is None else self.norm(x), after


def _check_end(pattern: str, levels: tuple[fit_plan.Level, ...], output: str, causal: bool) -> None:
    latents_last = levels[-1].global_layers > 0
    if output == "latents" and causal:
        raise ConfigError("output", "a causal FIT gives out its tokens; set output to tokens")
    if output == "latents" and not latents_last:
        raise ConfigError("pattern", f"{pattern!r} ends with local layers, which latents never see; leave them out")
    if output == "tokens" and latents_last:
        raise ConfigError(
            "pattern", f"{pattern!r} ends with global layers, which no token reads; add local ones or set output"
        )


def _group_size(axes: tuple[int, ...], groups: Any, group_size: Any, latents: int, pattern: str) -> tuple[int, ...]:
    """Tokens of a group along each axis, from what the config gives of groups and group_size."""
    if groups is not None and group_size is not None:
        raise ConfigError("groups", "follows from group_size; leave one of them None")
    if groups is None and group_size is None:
        return fit_plan.propose(axes, latents=latents, pattern=pattern).group_size
    field, given = ("groups", groups) if group_size is None else ("group_size", group_size)
    sizes = (given,) if isinstance(given, int) else tuple(given)
    if len(sizes) != len(axes):
        what = "a sequence" if len(axes) == 1 else f"a grid of {' x '.join(map(str, axes))} tokens"
        raise ConfigError(field, f"{given} is not one number for each of the {len(axes)} axes of {what}")
    for length, size in zip(axes, sizes):
        if size > length:
            raise ConfigError(field, f"{given} is more than the tokens there are: {' x '.join(map(str, axes))}")
    return sizes if field == "group_size" else tuple(-(-length // size) for length, size in zip(axes, sizes))


def _runs(parts: tuple[str, ...], channel: str | None, lengths: list[int]) -> list[list[Layer]]:
    """The layers of each run; the pattern of parts goes on from one run to the next."""
    names = [parts[i % len(parts)] for i in range(sum(lengths))]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [[(name, channel) for name in names[start : start + n]] for start, n in zip(starts, lengths)]
