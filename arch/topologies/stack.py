"""A run of residual blocks of one width: what every topology is made of."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.auxiliary import add_loss, pop_losses
from arch.errors import ConfigError
from arch.mixers.contract import State
from arch.positions import Rotary
from arch.registry import CHANNEL_MIXERS, MIXERS
from arch.rng import streams
from arch.topologies.block import Block
from arch.topologies.parts import Parts

Layer = tuple[str, str | None]  # the names of a token mixer and a channel mixer

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,  # keeps the products with weights
    "full": jax.checkpoint_policies.nothing_saveable,
}
TURN = 1 << 10  # random counts apart from one turn of a loop to the next


class Stack(nnx.Module):
    """Blocks in a row, layers[i] naming the parts of block i; with last_norm one more norm behind pre-norm blocks.

    loops runs the row so many times with the same weights (Dehghani et al. 2018, arXiv:1807.03819, without its time
    embedding and halting). scan stacks the parameters of layers that repeat on a leading axis and runs each such run
    as one loop, so that compile time does not grow with depth; what does not repeat stays as it is.
    drop_path is the rate of each block, () for none.
    """

    def __init__(
        self,
        parts: Parts,
        layers: Sequence[Layer],
        *,
        width: int,
        causal: bool,
        max_length: int,
        rotary: Rotary | None = None,
        drop_path: Sequence[float] = (),
        layer_scale: float | None = None,
        residual_scale: float | None = None,
        remat: str = "none",
        scan: bool = False,
        loops: int = 1,
        last_norm: bool = False,
    ):
        for mixer, channel in layers:
            parts.require("layers", mixer, MIXERS)
            if channel is not None:
                parts.require("channel", channel, CHANNEL_MIXERS)
        parts.require_modes([mixer for mixer, _ in layers], causal)
        if scan and any(drop_path):
            raise ConfigError("drop_path", "its rate grows with depth, and scanned layers are alike; set scan=False")
        self.remat, self.loops, self.causal = remat, loops, causal

        def make(i: int, rngs: nnx.Rngs | None = None) -> Block:
            mixer, channel = layers[i]
            return (parts if rngs is None else parts.with_rngs(rngs)).block(
                mixer,
                channel,
                width=width,
                causal=causal,
                max_length=max_length,
                rotary=rotary,
                layer_scale=layer_scale,
                residual_scale=residual_scale,
                drop_path=drop_path[i] if drop_path else 0.0,
            )

        if not scan:
            self.blocks: Any = nnx.List([make(i) for i in range(len(layers))])
        else:
            self.blocks = self._scanned(make, layers, parts.rngs)
        self.norm = parts.norm(width) if last_norm and parts.placement == "pre" else None

    def _scanned(self, make: Callable[..., Block], layers: Sequence[Layer], rngs: nnx.Rngs) -> Any:
        """What repeats as Repeated, the rest as it is."""
        runs = repeats(layers)
        if all(times == 1 for _, _, times in runs):
            raise ConfigError("scan", "no layer repeats, so there is nothing to scan over; set scan=False")
        blocks: Any = nnx.List([])
        for start, period, times in runs:
            if times == 1:
                blocks.append(make(start))
            else:
                places = range(start, start + period)
                blocks.append(Repeated(functools.partial(_each, make, places), times, self.remat, rngs=rngs))
        return blocks

    def _last(self, x: Array) -> Array:
        return x if self.norm is None else self.norm(x)

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *A D"]:
        for turn in range(self.loops):
            for i in range(len(self.blocks)):
                x = self._block(i, turn, x, keep=keep, segment_ids=segment_ids)
        return self._last(x)

    def _block(self, i: int, turn: int, x: Array, **masks: Array | None) -> Array:
        block = self.blocks[i]
        with jax.named_scope(f"blocks/{i}"):  # the parameters' path, for profiles and the cost table
            if isinstance(block, Repeated):
                return block(x, turn, **masks)
            if self.remat == "none":
                return block(x, **masks)
            x, losses = run_block(block, x, self.remat, turn, **masks)
            for loss in losses:
                add_loss(self, loss)
        return x

    def read(
        self, x: Float[Array, "B T D"], count: int, *, keep: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B P D"]:
        """What __call__ gives at the first `count` tokens, but for rounding: the last block computes no others."""
        last = len(self.blocks) - 1
        for i in range(last):
            x = self._block(i, 0, x, keep=keep, segment_ids=None)
        with jax.named_scope(f"blocks/{last}"):
            x = self.blocks[last].read(x, count, keep=keep)
        return self._last(x)

    def check_read(self) -> None:
        """Raises where the last block is not one of its own."""
        if self.loops > 1 or isinstance(self.blocks[len(self.blocks) - 1], Repeated):
            raise ConfigError("read", "looped and scanned layers are all alike; use all, or loops=1 and scan=False")

    def init_state(self, batch: int, max_length: int) -> list[Any]:
        """One entry a block and turn; that of repeated blocks has their leading axis."""
        return [block.init_state(batch, max_length) for _ in range(self.loops) for block in self.blocks]

    def step(self, x: Float[Array, "B *C D"], states: list[Any]) -> tuple[Float[Array, "B *C D"], list[Any]]:
        after = []
        for i, state in enumerate(states):
            x, state = self.blocks[i % len(self.blocks)].step(x, state)
            after.append(state)
        return self._last(x), after


def _each(make: Callable[[int, nnx.Rngs], Block], places: Sequence[int], rngs: nnx.Rngs) -> list[Block]:
    return [make(i, rngs) for i in places]


class Repeated(nnx.Module):
    """The same blocks `times` over with weights of their own: every parameter has a leading axis of that size."""

    def __init__(self, make: Callable[[nnx.Rngs], list[Block]], times: int, remat: str, *, rngs: nnx.Rngs):
        self.times, self.remat = times, remat
        graphs = []

        def one(params: Array, dropout: Array) -> tuple[Any, Any]:
            blocks = nnx.List(make(streams(params=params, dropout=dropout)))
            graph, *leaves = nnx.split(blocks, nnx.Param, nnx.RngState)
            graphs.append(graph)
            return leaves[0], leaves[1]

        leaves = jax.vmap(one)(*(jax.random.split(key, times) for key in (rngs.params(), rngs.dropout())))
        self.blocks: Any = nnx.merge(graphs[0], *leaves)

    def __call__(self, x: Float[Array, "B *A D"], turn: int = 0, **masks: Array | None) -> Float[Array, "B *A D"]:
        graph, params, random = _split(self.blocks, turn)

        def body(x: Array, leaves: Any) -> tuple[Array, list[Array]]:
            blocks = nnx.merge(graph, *leaves)
            for i, block in enumerate(blocks):
                with jax.named_scope(f"blocks/{i}"):
                    x = block(x, **masks)
            return x, pop_losses(blocks)

        x, losses = jax.lax.scan(_remat(body, self.remat), x, (params, random))
        for loss in losses:
            add_loss(self, loss.sum())
        return x

    def init_state(self, batch: int, max_length: int) -> list[State]:
        one = [block.init_state(batch, max_length) for block in self.blocks]
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.times, *a.shape)), one)

    def step(self, x: Float[Array, "B *C D"], state: list[State]) -> tuple[Float[Array, "B *C D"], list[State]]:
        graph, *leaves = nnx.split(self.blocks, nnx.Param, nnx.RngState)

        def body(x: Array, given: Any) -> tuple[Array, list[State]]:
            leaves, states = given
            after = []
            for block, state in zip(nnx.merge(graph, *leaves), states):
                x, state = block.step(x, state)
                after.append(state)
            return x, after

        return jax.lax.scan(body, x, (tuple(leaves), state))


def run_block(
    block: Any, x: Array, remat: str, turn: int | Array = 0, **masks: Array | None
) -> tuple[Array, list[Array]]:
    """The block's output and its losses, its inner values recomputed in the backward pass as `remat` says."""
    graph, params, random = _split(block, turn)

    def run(leaves: Any, x: Array) -> tuple[Array, list[Array]]:
        copy = nnx.merge(graph, *leaves)
        return copy(x, **masks), pop_losses(copy)

    return _remat(run, remat)((params, random), x)


def _remat(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    policy = REMAT[remat]
    return function if policy is None else jax.checkpoint(function, policy=policy)


def _split(module: Any, turn: int | Array) -> tuple[Any, Any, Any]:
    """Graph, parameters and random state, whose counts are moved on so that no two turns share random numbers."""
    states: Any = nnx.split(module, nnx.Param, nnx.RngState)
    graph, params, random = states
    random = jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a + turn * TURN, random)
    return graph, params, random


def repeats(layers: Sequence[Layer]) -> list[tuple[int, int, int]]:
    """The layers as runs (start, period, times) in order: layers[start : start + period] stands there `times` times.

    Each run is the longest repetition that starts where the last one ended, of the shortest period.
    """
    runs, start = [], 0
    while start < len(layers):
        best = (1, 1)
        for period in range(1, (len(layers) - start) // 2 + 1):
            times = 1
            while layers[start : start + period] == layers[start + times * period : start + (times + 1) * period]:
                times += 1
            if times > 1 and period * times > best[0] * best[1]:
                best = (period, times)
        runs.append((start, *best))
        start += best[0] * best[1]
    return runs
