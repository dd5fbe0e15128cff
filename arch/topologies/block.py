"""The residual block that every topology stacks."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.layers import Dropout
from arch.mixers.contract import State

Placement = Literal["pre", "post"]


class DropPath(nnx.Module):
    """Leaves a whole branch out, for each example with probability `rate`, and scales the rest by 1 / (1 - rate).

    Stochastic depth, Huang et al. 2016, arXiv:1603.09382. Identity when deterministic.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.inner = nnx.Dropout(rate, rngs=rngs) if rate else None

    def __call__(self, x: Float[Array, "B *A D"]) -> Float[Array, "B *A D"]:
        if self.inner is None:
            return x
        return x * self.inner(jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), x.dtype))


class Residual(nnx.Module):
    """x + dropout(f(norm(x))) with the norm before (pre), or norm(x + dropout(f(x))) with the norm after (post).

    Post is Vaswani et al. 2017, arXiv:1706.03762; pre is Xiong et al. 2020, arXiv:2002.04745. layer_scale, a number,
    multiplies the branch by a learnt vector that starts there (Touvron et al. 2021, arXiv:2103.17239); residual_scale
    the x that passes by (Shleifer et al. 2021, arXiv:2110.09456).
    """

    def __init__(
        self,
        norm: nnx.Module,
        placement: Placement,
        dropout: float,
        *,
        width: int = 0,
        layer_scale: float | None = None,
        residual_scale: float | None = None,
        drop_path: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.norm, self.placement = norm, placement
        self.dropout, self.drop_path = Dropout(dropout, rngs=rngs), DropPath(drop_path, rngs=rngs)
        self.scale = None if layer_scale is None else nnx.Param(jnp.full((width,), layer_scale))
        self.residual_scale = None if residual_scale is None else nnx.Param(jnp.full((width,), residual_scale))

    def __call__(self, x: Array, f: Callable[[Array], Array], count: int | None = None) -> Array:
        """f may give the first `count` tokens alone; then so does this."""
        first = x if count is None else x[:, :count]
        if self.placement == "pre":
            return self.add(first, f(self.norm(x)))
        return self.norm(self.add(first, f(x)))

    def add(self, x: Array, branch: Array) -> Array:
        branch = self.dropout(branch)
        if self.scale is not None:
            branch = branch * self.scale[...].astype(x.dtype)
        if self.residual_scale is not None:
            x = x * self.residual_scale[...].astype(x.dtype)
        return x + self.drop_path(branch)


class Block(nnx.Module):
    """A token mixer and then, unless it is None, a channel mixer, each in a residual.

    parallel: x + mixer(norm(x)) + channel(norm(x)) with one norm (Wang and Komatsuzaki 2021, GPT-J).
    """

    def __init__(
        self,
        mixer: Any,
        channel: Any | None,
        make_norm: Callable[[], nnx.Module],
        *,
        placement: Placement,
        dropout: float,
        parallel: bool = False,
        rngs: nnx.Rngs,
        **scales: Any,  # width, layer_scale, residual_scale, drop_path: of both residuals
    ):
        self.mixer, self.channel, self.parallel = mixer, channel, parallel
        self.mix = Residual(make_norm(), placement, dropout, rngs=rngs, **scales)
        self.transform = (
            None if channel is None or parallel else Residual(make_norm(), placement, dropout, rngs=rngs, **scales)
        )

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *A D"]:
        return self._run(x, lambda x: mix(self.mixer, x, keep=keep, segment_ids=segment_ids), keep)

    def read(
        self, x: Float[Array, "B T D"], count: int, *, keep: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B P D"]:
        """What __call__ gives at the first `count` tokens; the channel mixer sees no others, nor the mixer's `read`."""
        if getattr(self.channel, "masked", False):  # what it does to one token hangs on the others
            return self(x, keep=keep)[:, :count]

        def mix(x: Array) -> Array:
            with jax.named_scope("mixer"):
                if hasattr(self.mixer, "read"):
                    return self.mixer.read(x, count, keep=keep)
                return self.mixer(x, keep=keep)[:, :count]

        return self._run(x, mix, keep, count)

    def _run(
        self,
        x: Array,
        mix: Callable[[Array], Array],
        keep: Array | None,
        count: int | None = None,
        decoding: bool = False,
    ) -> Array:
        def channel(x: Array) -> Array:
            assert self.channel is not None
            with jax.named_scope("channel"):
                if not getattr(self.channel, "masked", False):
                    return self.channel(x)
                if decoding:  # every token a row of its own
                    return self.channel(x.reshape(-1, x.shape[-1])).reshape(x.shape)
                return self.channel(x, keep=keep)

        if self.channel is None:
            return self.mix(x, mix, count)
        if self.transform is None:
            return self.mix(x, lambda x: mix(x) + channel(x if count is None else x[:, :count]), count)
        return self.transform(self.mix(x, mix, count), channel)

    def init_state(self, batch: int, max_length: int) -> State:
        return self.mixer.init_state(batch, max_length)

    def step(self, x: Float[Array, "B *C D"], state: State) -> tuple[Float[Array, "B *C D"], State]:
        """One more token, or several in a row, which are one chunk to a mixer that knows chunks."""
        after: list[State] = []

        def mix(x: Array) -> Array:
            y, new = advance(self.mixer, x, state)
            after.append(new)
            return y

        x = self._run(x, mix, None, decoding=True)
        return x, after[0]


def mix(mixer: Any, x: Array, *, keep: Array | None = None, segment_ids: Array | None = None) -> Array:
    """The mixer over x[B *A D]; one that reads sequences gets a grid in row-major order."""
    with jax.named_scope("mixer"):
        if mixer.axes is None or x.ndim == 3:
            return mixer(x, keep=keep, segment_ids=segment_ids)
        batch, *grid, width = x.shape
        flat = [None if a is None else a.reshape(batch, -1) for a in (keep, segment_ids)]
        y = mixer(x.reshape(batch, -1, width), keep=flat[0], segment_ids=flat[1])
        return y.reshape(batch, *grid, width)


def advance(mixer: Any, x: Array, state: State) -> tuple[Array, State]:
    """The mixer one token further, x[B D], or a chunk, x[B C D]."""
    if x.ndim == 2:
        return mixer.step(x, state)
    if getattr(mixer, "causal_chunk", None) is not None:
        return mixer.extend(x, state)

    def one(state: State, x: Array) -> tuple[State, Array]:
        y, state = mixer.step(x, state)
        return state, y

    state, y = jax.lax.scan(one, state, x.swapaxes(0, 1))
    return y.swapaxes(0, 1), state
