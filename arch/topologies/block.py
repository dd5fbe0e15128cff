"""The residual block that every topology stacks."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.layers import Dropout
from arch.mixers.contract import State

Placement = Literal["pre", "post"]


class Residual(nnx.Module):
    """x + dropout(f(norm(x))) with the norm before (pre), or norm(x + dropout(f(x))) with the norm after (post).

    Post is Vaswani et al. 2017, arXiv:1706.03762; pre is Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, norm: nnx.Module, placement: Placement, dropout: float, *, rngs: nnx.Rngs):
        self.norm, self.placement = norm, placement
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array, f: Callable[[Array], Array]) -> Array:
        if self.placement == "pre":
            return x + self.dropout(f(self.norm(x)))
        return self.norm(x + self.dropout(f(x)))


class Block(nnx.Module):
    """A token mixer and then, unless it is None, a channel mixer, each in a residual."""

    def __init__(
        self,
        mixer: Any,
        channel: Any | None,
        make_norm: Callable[[], nnx.Module],
        *,
        placement: Placement,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        self.mixer, self.channel = mixer, channel
        self.mix = Residual(make_norm(), placement, dropout, rngs=rngs)
        self.transform = None if channel is None else Residual(make_norm(), placement, dropout, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *A D"]:
        def mix(x: Array) -> Array:
            with jax.named_scope("mixer"):
                if self.mixer.axes is None or x.ndim == 3:
                    return self.mixer(x, keep=keep, segment_ids=segment_ids)
                batch, *grid, width = x.shape  # a sequence mixer reads a grid in row-major order
                flat = [None if a is None else a.reshape(batch, -1) for a in (keep, segment_ids)]
                y = self.mixer(x.reshape(batch, -1, width), keep=flat[0], segment_ids=flat[1])
                return y.reshape(batch, *grid, width)

        return self._transform(self.mix(x, mix))

    def _transform(self, x: Array) -> Array:
        if self.channel is None or self.transform is None:
            return x
        return self.transform(x, jax.named_scope("channel")(self.channel))

    def init_state(self, batch: int, max_length: int) -> State:
        return self.mixer.init_state(batch, max_length)

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One more token; the channel mixer needs no state."""
        after: list[State] = []

        def mix(x: Array) -> Array:
            y, new = self.mixer.step(x, state)
            after.append(new)
            return y

        x = self._transform(self.mix(x, mix))
        return x, after[0]


REMAT = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,  # keeps the products with weights
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_block(block: Block, x: Array, remat: str, **masks: Array | None) -> Array:
    """The block, its inner values recomputed in the backward pass as `remat` ("none", "dots", "full") says."""
    if remat == "none":
        return block(x, **masks)
    return nnx.remat(lambda block, x: block(x, **masks), policy=REMAT[remat])(block, x)
