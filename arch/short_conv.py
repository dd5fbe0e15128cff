"""Mixing with the last few tokens: the short convolution and the token shift in front of many mixers."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.layers import NEARLY_ZERO
from arch.ops.segments import same_segment
from kernels_pallas.causal_conv import causal_conv

State = dict[str, Any]


class ShortConv(nnx.Module):
    """y_t = f(sum_{i < size} w_i * x_{t - i} (+ b)): a causal convolution, every channel by itself. O(T D size).

    f is the activation, SiLU or none. Padding and other segments read as zeros. The kernel [size D], newest token
    first, starts uniform in +- 1 / sqrt(size), as the convolutions of Mamba (Gu and Dao 2023, arXiv:2312.00752) do.
    """

    def __init__(
        self,
        width: int,
        *,
        size: int = 4,
        bias: bool = True,
        activation: Literal["silu"] | None = None,
        rngs: nnx.Rngs,
    ):
        self.width, self.size, self.activation = width, size, activation
        bound = size**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (size, width), minval=-bound, maxval=bound))
        self.bias = nnx.Param(NEARLY_ZERO(rngs.params(), (width,), jnp.float32)) if bias else None

    def _convolve(self, x: Array, past: Array | None, **options: Any) -> tuple[Array, Array]:
        bias = None if self.bias is None else self.bias[...]
        return causal_conv(x, self.kernel[...], bias, past, activation=self.activation, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        return self._convolve(x, None, keep=keep, segment_ids=segment_ids)[0]

    def init_state(self, batch: int) -> State:
        return {"past": jnp.zeros((batch, self.size - 1, self.width), self.kernel.dtype)}  # oldest token first

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        y, past = self._convolve(x[:, None], state["past"], implementation="chunked")  # one token needs no kernel
        return y[:, 0], {"past": past}


class TokenShift(nnx.Module):
    """y_t = m * x_t + (1 - m) * x_{t-1} with one learnt m a channel, 1/2 at first; x_{-1} = 0.

    Source: Peng et al. 2023, arXiv:2305.13048 (RWKV). Padding and other segments read as zeros.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.width = width
        self.share = nnx.Param(jnp.full((width,), 0.5))

    def _mix(self, x: Array, earlier: Array) -> Array:
        share = self.share[...].astype(jnp.float32)
        return (share * x + (1 - share) * earlier).astype(x.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        if keep is not None:
            x = jnp.where(keep[..., None], x, 0)
        earlier = jnp.pad(x, [(0, 0), (1, 0), (0, 0)])[:, : x.shape[1]]
        if segment_ids is not None:
            earlier = jnp.where(same_segment(segment_ids, 1)[..., None], earlier, 0)
        return self._mix(x, earlier)

    def init_state(self, batch: int) -> State:
        return {"past": jnp.zeros((batch, self.width), self.share.dtype)}

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        return self._mix(x, state["past"].astype(x.dtype)), {"past": x.astype(state["past"].dtype)}
