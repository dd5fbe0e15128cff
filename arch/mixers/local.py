"""Local attention token mixer. Source: the Long Range Arena release, Tay et al. 2020, arXiv:2011.04006."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError
from arch.mixers.contract import State
from arch.mixers.pattern_attention import PatternAttention
from arch.ops.block_attention import fill, within_blocks
from arch.ops.heads import join_heads
from arch.positions import Rotary
from arch.registry import MIXERS
from arch.schema import Positive
from kernels_pallas.attention import attention


@MIXERS.register("local")
class Local(PatternAttention):
    """Softmax attention to near tokens only: those of the same block, or those in a window that moves along.

    block: y_t sees s with s // block = t // block, as Long Range Arena's text and figures have it; O(T block K) a head.
    window: y_t sees t - window < s <= t (causal), or |s - t| <= window // 2; O(T window K) a head (the sliding window
    of arXiv:2004.05150, here as a part of hybrids). Blocks stand at fixed places of the row, whatever its padding and
    packing. The decode state holds the keys and values of one block or window, whatever the length.

    Long Range Arena's released code (block 50) computes something else: it cuts the row of T tokens into T / block
    classes t mod (T / block), so that a token sees `block` tokens spread evenly over the whole row, while its mask of
    padding is cut into contiguous blocks. It also appends zeros, a whole block of them if T divides, which are seen.
    order="interleaved" has the classes (bidirectional only, since they depend on T), with the mask where it belongs
    and no zeros seen.
    """

    modes = ("causal", "bidirectional")
    axes = 1
    packing = ("causal", "bidirectional")

    def __init__(
        self,
        width: int,
        *,
        causal: bool,
        num_heads: Positive = 8,
        head_dim: Positive | None = None,  # K = V; None: width / num_heads
        kv_heads: Positive | None = None,  # G; None: num_heads
        block: Positive | None = None,  # None: 50, unless a window is given
        window: Positive | None = None,
        order: Literal["contiguous", "interleaved"] = "contiguous",  # of the tokens of a block
        bias: bool = False,
        implementation: str | None = None,  # a name known to the op `attention`
        rotary: Rotary | None = None,
        rngs: nnx.Rngs,
    ):
        if block is not None and window is not None:
            raise ConfigError("window", "a local mixer has a block or a window; leave one of them None")
        if order == "interleaved" and (causal or window is not None):
            raise ConfigError("order", "only the blocks of a bidirectional mixer can be interleaved; use contiguous")
        self.block = 50 if block is None and window is None else block
        self.window, self.interleaved = window, order == "interleaved"
        super().__init__(
            width,
            causal=causal,
            num_heads=num_heads,
            head_dim=head_dim,
            kv_heads=kv_heads,
            bias=bias,
            implementation=implementation,
            rotary=rotary,
            rngs=rngs,
        )

    def _sides(self) -> tuple[int, int]:
        assert self.window is not None
        return (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)

    def visible(self, length: int) -> Bool[np.ndarray, "1 T T"]:
        t = np.arange(length)
        offset = t[None] - t[:, None]
        if self.block is None:
            left, right = self._sides()
            return ((offset >= -left) & (offset <= right))[None]
        place = t % -(-length // self.block) if self.interleaved else t // self.block
        return ((place[:, None] == place[None]) & ((offset <= 0) | (not self.causal)))[None]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes along T. keep is False on padding, which nothing then attends to."""
        q, k, v = self.project(x)
        if self.block is None:
            y = attention(
                *(q, k, v),
                causal=self.causal,
                window=self._sides(),
                keep=keep,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )
        elif self.interleaved:
            y = self._interleaved(q, k, v, keep, segment_ids)
        else:
            y, _ = within_blocks(
                q,
                k,
                v,
                self.block,
                causal=self.causal,
                keep=keep,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )
        return self.out(join_heads(y))

    def _interleaved(self, q, k, v, keep, segment_ids):
        assert self.block is not None
        length = q.shape[1]
        classes = max(1, -(-length // self.block))
        keep = jnp.ones(q.shape[:2], bool) if keep is None else keep

        def gather(x):  # the tokens of a class one behind the other
            x = fill(x, classes * self.block - length)
            return x.reshape(x.shape[0], self.block, classes, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)

        y, _ = within_blocks(
            gather(q),
            gather(k),
            gather(v),
            self.block,
            causal=False,
            keep=gather(keep),
            segment_ids=None if segment_ids is None else gather(segment_ids),
            implementation=self.implementation,
        )
        y = y.reshape(y.shape[0], classes, self.block, *y.shape[2:]).swapaxes(1, 2).reshape(y.shape)
        return y[:, :length]

    def init_state(self, batch: int, max_length: int) -> State:
        return self.cache(batch, self.block or self._sides()[0] + 1)

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One more token, written over the oldest of the window or the last block's."""
        length, size = state["length"], state["k"].shape[1]
        written = jnp.minimum(length, size - 1) if self.block is None else length % size  # the last visible place
        return self.step_in_ring(x, state, length % size, written + 1)
