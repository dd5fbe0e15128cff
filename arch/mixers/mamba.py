"""Mamba token mixer. Source: Gu & Dao 2023, arXiv:2312.00752."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError
from arch.layers import dense
from arch.mixers.contract import State, known_implementation
from arch.ops.segments import first_tokens
from arch.registry import MIXERS
from arch.schema import Positive, PositiveFloat
from arch.short_conv import ShortConv
from kernels_pallas.selective_scan import IMPLEMENTATIONS, selective_scan


def initial_steps(count: int, low: float, high: float, key: jax.Array) -> Float[Array, " n"]:
    """b such that softplus(b) is log-uniform in [low, high]: the bias of Mamba's step sizes."""
    if low > high:
        raise ConfigError("step_min", f"{low:g} is above step_max {high:g}")
    steps = jnp.exp(jax.random.uniform(key, (count,), minval=math.log(low), maxval=math.log(high)))
    return steps + jnp.log(-jnp.expm1(-steps))  # the inverse of softplus


@MIXERS.register("mamba")
class Mamba(nnx.Module):
    """A selective state-space model of N states a channel, gated; a whole block that needs no channel mixer.

        u, z    = x W_in                                       E = expand D channels each
        u       = silu(conv(u))                                causal, every channel by itself
        r, B, C = u W_x                                        widths R, N, N
        delta   = softplus(r W_delta + b_delta)                [B T E]
        h_t     = exp(delta_t A) h_{t-1} + delta_t u_t B_t     A = -exp(A_log), [E N]
        y_t     = (h_t C_t + D u_t) * silu(z_t) W_out

    O(T E N) and memory linear in T; the decode state is [E N] and the last tokens of the convolution. The layer of the
    paper is this mixer with `channel: None`.

    At first A = -(1 ... N) in every channel (S4D-Real), D = 1, and b_delta makes steps log-uniform between step_min and
    step_max, as in the paper. The large projections start as the other mixers' do, Xavier-uniform. As in the authors'
    code the step enters B by Euler's rule, delta B, not by the zero-order hold of the paper's equation 4.
    """

    modes = ("causal",)
    axes = 1
    packing = ("causal",)

    def __init__(
        self,
        width: int,
        *,
        causal: bool,
        expand: Positive = 2,  # E / D
        state_size: Positive = 16,  # N
        conv_size: Positive = 4,
        step_rank: Positive | None = None,  # R; None: a sixteenth of the width, rounded up
        step_min: PositiveFloat = 0.001,
        step_max: PositiveFloat = 0.1,
        implementation: str | None = None,  # a name known to the op `selective_scan`
        rngs: nnx.Rngs,
    ):
        if not causal:
            raise ConfigError("causal", "mamba runs from left to right; wrap it in `bidirectional`")
        inner, rank = expand * width, step_rank or -(-width // 16)
        self.inner, self.state_size, self.rank = inner, state_size, rank
        self.implementation = known_implementation(implementation, IMPLEMENTATIONS)
        self.inputs = dense(width, 2 * inner, bias=False, rngs=rngs)
        self.conv = ShortConv(inner, size=conv_size, activation="silu", rngs=rngs)
        self.select = dense(inner, rank + 2 * state_size, bias=False, rngs=rngs)
        bound = rank**-0.5
        self.steps = nnx.Param(jax.random.uniform(rngs.params(), (rank, inner), minval=-bound, maxval=bound))
        self.steps_bias = nnx.Param(initial_steps(inner, step_min, step_max, rngs.params()))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1.0, state_size + 1)), (inner, 1)))
        self.D = nnx.Param(jnp.ones((inner,)))
        self.out = dense(inner, width, bias=False, rngs=rngs)

    def _scan(
        self, u: Array, z: Array, keep: Array | None, state: Array | None, reset: Array | None
    ) -> tuple[Array, Array]:
        """What follows the convolution: the output [B T D] and the last state."""
        r, B, C = jnp.split(self.select(u), [self.rank, self.rank + self.state_size], axis=-1)
        delta = jax.nn.softplus((r @ self.steps[...].astype(r.dtype)).astype(jnp.float32) + self.steps_bias[...])
        if keep is not None:
            delta = delta * keep[..., None]
        A = -jnp.exp(self.A_log[...].astype(jnp.float32))
        y, state = selective_scan(
            u, delta, A, B, C, self.D[...], state, reset=reset, implementation=self.implementation
        )
        return self.out(y * nnx.silu(z)), state

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes along T. keep is False on padding, which then contributes nothing."""
        u, z = jnp.split(self.inputs(x), 2, axis=-1)
        u = self.conv(u, keep, segment_ids)
        reset = None if segment_ids is None else first_tokens(segment_ids)
        return self._scan(u, z, keep, None, reset)[0]

    def init_state(self, batch: int, max_length: int) -> State:
        h = jnp.zeros((batch, self.inner, self.state_size), jnp.float32)
        return {"conv": self.conv.init_state(batch), "h": h}

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        u, z = jnp.split(self.inputs(x), 2, axis=-1)
        u, conv = self.conv.step(u, state["conv"])
        y, h = self._scan(u[:, None], z[:, None], None, state["h"], None)
        return y[:, 0], {"conv": conv, "h": h}
