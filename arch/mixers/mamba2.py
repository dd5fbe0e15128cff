"""Mamba-2 token mixer (SSD). Source: Dao & Gu 2024, arXiv:2405.21060."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError
from arch.layers import dense
from arch.mixers.contract import State, known_implementation
from arch.mixers.mamba import initial_steps
from arch.norms import HeadNorm
from arch.ops.segments import first_tokens
from arch.registry import MIXERS
from arch.schema import Positive, PositiveFloat
from arch.short_conv import ShortConv
from kernels_pallas.linear_attention import IMPLEMENTATIONS, linear_attention


@MIXERS.register("mamba2")
class Mamba2(nnx.Module):
    """Mamba with one decay a head, which makes it a linear attention: queries C, keys B, values delta u.

        z, (u, B, C), r = x W_in                               E = expand D, in H heads of V; B and C in G groups of N
        u, B, C = silu(conv(u, B, C))                          causal, every channel by itself
        delta   = softplus(r + b_delta)                        [B T H]
        S_t     = exp(-exp(A_log) delta_t) S_{t-1} + B_t (delta_t u_t)^T
        y_t     = norm((S_t^T C_t + D u_t) * silu(z_t)) W_out

    E / V heads share G pairs of B and C. The norm is RMS over each group's E / G channels, after the gate.
    O(T E N) and memory linear in T; the decode state is [H N V] and the last tokens of the convolution.

    At first exp(A_log) is uniform in [1, 16] a head, D = 1, and b_delta makes steps log-uniform between step_min and
    step_max, as in the authors' code. The projections start as the other mixers' do, Xavier-uniform.
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
        head_dim: Positive | None = None,  # V; None: 64, or the largest power of two up to it that divides E
        state_size: Positive = 128,  # N
        groups: Positive = 1,  # G
        conv_size: Positive = 4,
        step_min: PositiveFloat = 0.001,
        step_max: PositiveFloat = 0.1,
        implementation: str | None = None,  # a name known to the op `linear_attention`
        rngs: nnx.Rngs,
    ):
        if not causal:
            raise ConfigError("causal", "mamba2 runs from left to right; wrap it in `bidirectional`")
        inner = expand * width
        self.head_dim = math.gcd(inner, 64) if head_dim is None else head_dim
        if inner % self.head_dim:
            raise ConfigError("head_dim", f"{self.head_dim} does not divide expand x width = {inner}")
        self.heads, self.groups, self.state_size = inner // self.head_dim, groups, state_size
        if self.heads % groups:
            raise ConfigError("groups", f"{groups} does not divide the {self.heads} heads, expand x width / head_dim")
        self.implementation = known_implementation(implementation, IMPLEMENTATIONS)
        mixed = inner + 2 * groups * state_size
        self.sizes = (inner, inner + mixed)  # where z ends and r starts
        self.inputs = dense(width, inner + mixed + self.heads, bias=False, rngs=rngs)
        self.conv = ShortConv(mixed, size=conv_size, activation="silu", rngs=rngs)
        self.steps_bias = nnx.Param(initial_steps(self.heads, step_min, step_max, rngs.params()))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (self.heads,), minval=1, maxval=16)))
        self.D = nnx.Param(jnp.ones((self.heads,)))
        self.norm = HeadNorm(groups, inner // groups, rngs=rngs)
        self.out = dense(inner, width, bias=False, rngs=rngs)

    def _select(self, mixed: Array, r: Array, keep: Array | None) -> list[Array]:
        """C and B [B T H N], u [B T H V] after the convolution; the steps and the log of the decay [B T H], float32."""
        batch, length, _ = mixed.shape
        inner, pair = self.heads * self.head_dim, self.groups * self.state_size
        u, B, C = jnp.split(mixed, [inner, inner + pair], axis=-1)
        u = u.reshape(batch, length, self.heads, self.head_dim)
        B, C = (a.reshape(batch, length, self.groups, self.state_size) for a in (B, C))
        B, C = (jnp.repeat(a, self.heads // self.groups, axis=2) for a in (B, C))
        delta = jax.nn.softplus(r.astype(jnp.float32) + self.steps_bias[...])
        if keep is not None:
            delta = delta * keep[..., None]
        return [C, B, u, delta, -jnp.exp(self.A_log[...].astype(jnp.float32)) * delta]

    def _scan(
        self, z: Array, mixed: Array, r: Array, keep: Array | None, state: Array | None, first: Array | None
    ) -> tuple[Array, Array]:
        """What follows the convolution: the output [B T D] and the last state."""
        C, B, u, delta, log_decay = self._select(mixed, r, keep)
        if first is not None:
            log_decay = jnp.where(first[..., None], -jnp.inf, log_decay)
        values = delta[..., None] * u  # float32, as the state is
        y, state = linear_attention(C, B, values, log_decay, state, implementation=self.implementation)
        y = y + self.D[...].astype(jnp.float32)[:, None] * u
        y = y.reshape(z.shape) * nnx.silu(z.astype(jnp.float32))
        y = self.norm(y.reshape(*z.shape[:2], self.groups, z.shape[2] // self.groups))
        return self.out(y.reshape(z.shape).astype(z.dtype)), state

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes along T. keep is False on padding, which then contributes nothing."""
        z, mixed, r = jnp.split(self.inputs(x), self.sizes, axis=-1)
        first = None if segment_ids is None else first_tokens(segment_ids)
        return self._scan(z, self.conv(mixed, keep, segment_ids), r, keep, None, first)[0]

    def weights(self, x: Float[Array, "B T D"], *, keep: Bool[Array, "B T"] | None = None) -> Float[Array, "B H T S"]:
        """M in y_t = sum_s M_ts u_s before the gate: C_t . B_s delta_s exp(sum of the log decays over s < i <= t).

        The paper's quadratic form, in memory T^2 and time T^3; D is its diagonal's addend.
        """
        _, mixed, r = jnp.split(self.inputs(x), self.sizes, axis=-1)
        C, B, _, delta, log_decay = self._select(self.conv(mixed, keep), r, keep)
        within = jnp.tril(jnp.ones((x.shape[1],) * 2, jnp.float32))  # [t i]: i <= t
        between = jnp.einsum("ti,bih,is->bhts", within, log_decay, jnp.tril(within, -1))
        pairs = jnp.einsum("bthn,bshn->bhts", C.astype(jnp.float32), B.astype(jnp.float32))
        pairs = pairs * jnp.where(within > 0, jnp.exp(between), 0.0) * delta.swapaxes(1, 2)[:, :, None]
        skip = self.D[...].astype(jnp.float32)[:, None, None] * jnp.eye(x.shape[1])
        return pairs + (skip if keep is None else skip * keep[:, None, None])

    def init_state(self, batch: int, max_length: int) -> State:
        S = jnp.zeros((batch, self.heads, self.state_size, self.head_dim), jnp.float32)
        return {"conv": self.conv.init_state(batch), "S": S}

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        z, mixed, r = jnp.split(self.inputs(x), self.sizes, axis=-1)
        mixed, conv = self.conv.step(mixed, state["conv"])
        y, S = self._scan(z[:, None], mixed[:, None], r[:, None], None, state["S"], None)
        return y[:, 0], {"conv": conv, "S": S}
