"""WideNet: one block run at every depth, its feed-forward a mixture of experts, the norms alone belonging to a depth.

Source: Xue et al. 2021, arXiv:2107.11817. With channel "mlp" it is ALBERT's sharing (Lan et al. 2019, arXiv:1909.11942)
with norms of their own; in ALBERT the norms are shared too.

Differences from the paper: the mixer may be any one, and the capacity of an expert belongs to a row, not to the batch.
The released code also applies GELU to what an expert gives out, and counts the first of the places it grants as taken.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.auxiliary import add_loss
from arch.mixers.contract import State
from arch.positions import Rotary
from arch.registry import CHANNEL_MIXERS, MIXERS, TOPOLOGIES
from arch.schema import Positive
from arch.topologies.block import Placement
from arch.topologies.parts import NormSection, Parts, PartSections
from arch.topologies.stack import run_block


@TOPOLOGIES.register("widenet")
class WideNet(nnx.Module):
    """x <- x + mixer(norm_i(x)),  x <- x + channel(norm'_i(x))  for i in 1..depth, the two mixers being shared.

    A mixture of experts sees another input at each depth and so routes the tokens anew; its losses add up over depth.
    The parameters of the norms have a leading axis of size depth, and the depths run as one loop: compile time does not
    grow with depth. Each depth has a decode state of its own. With norm_placement "pre" a last norm follows.
    """

    def __init__(
        self,
        *,
        width: Positive,
        depth: Positive,
        mixer: str = "mixer",  # the parts
        channel: str = "moe",
        parts: PartSections,
        norm: NormSection,
        norm_placement: Placement = "pre",
        dropout: float = 0.0,
        causal: bool = False,
        rotary: Rotary | None = None,
        max_length: int,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.width, self.depth, self.remat = width, depth, remat
        made = Parts(parts, norm=norm, placement=norm_placement, dropout=dropout, rngs=rngs)
        made.require("mixer", mixer, MIXERS)
        made.require("channel", channel, CHANNEL_MIXERS)
        made.require_modes([mixer], causal)
        if rotary is not None:
            made.require_rotary([mixer])
        self.block = made.block(mixer, channel, width=width, causal=causal, max_length=max_length, rotary=rotary)
        assert self.block.transform is not None
        for residual in (self.block.mix, self.block.transform):
            residual.norm = _stacked(lambda: made.norm(width), depth)
        self.norm = made.norm(width) if norm_placement == "pre" else None

    def _split(self) -> tuple[Any, Any, Any, Any]:
        """Graph, the norms' parameters [depth ...], those that are shared, random state."""
        states: Any = nnx.split(self.block, _of_norm, nnx.Param, nnx.RngState)
        return states

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *A D"]:
        graph, norms, shared, random = self._split()

        def one(x: Array, given: Any) -> tuple[Array, list[Array]]:
            norms, depth = given
            block = nnx.merge(graph, norms, shared, random)
            return run_block(block, x, self.remat, depth, keep=keep, segment_ids=segment_ids)

        with jax.named_scope("block"):  # the parameters' path, for profiles and the cost table
            x, losses = jax.lax.scan(one, x, (norms, jnp.arange(self.depth, dtype=jnp.uint32)))
        for loss in losses:
            add_loss(self, loss.sum())
        return x if self.norm is None else self.norm(x)

    def init_state(self, batch: int, max_length: int) -> State:
        """That of the block, with a leading axis of size depth."""
        one = self.block.init_state(batch, max_length)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.depth, *a.shape)), one)

    def step(self, x: Float[Array, "B *C D"], state: State) -> tuple[Float[Array, "B *C D"], State]:
        """One more token, through all depths."""
        graph, norms, shared, random = self._split()

        def one(x: Array, given: Any) -> tuple[Array, State]:
            norms, state = given
            return nnx.merge(graph, norms, shared, random).step(x, state)

        x, state = jax.lax.scan(one, x, (norms, state))
        return (x if self.norm is None else self.norm(x)), state


def _stacked(make: Any, times: int) -> nnx.Module:
    """A module whose parameters have a leading axis of size `times`; not to be called as it is."""
    graph, leaves = nnx.split(make())
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.broadcast_to(a, (times, *a.shape)), leaves))


def _of_norm(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a variable of a block belongs to one of its two norms."""
    return isinstance(value, nnx.Param) and tuple(path[:2]) in (("mix", "norm"), ("transform", "norm"))
