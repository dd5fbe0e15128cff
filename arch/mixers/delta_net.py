"""DeltaNet token mixer. Source: Yang, Wang, Zhang, Shen and Kim 2024, arXiv:2406.06484."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError
from arch.layers import Exact, dense
from arch.mixers.contract import State, head_width, known_implementation
from arch.norms import HeadNorm
from arch.ops.heads import join_heads, split_heads
from arch.ops.segments import first_tokens
from arch.registry import MIXERS
from arch.schema import Positive
from arch.short_conv import ShortConv
from kernels_pallas.delta_rule import IMPLEMENTATIONS, delta_rule

FEATURES = {"silu": nnx.silu, "elu": lambda x: nnx.elu(x) + 1, "relu": nnx.relu, "identity": lambda x: x}
EPS = 1e-6  # beside the length of q and k, which may be 0


@MIXERS.register("delta_net")
class DeltaNet(nnx.Module):
    """A memory S [K V] a head in which a token overwrites what its key finds. O(T K V) a head.

        S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T        y_t = S_t^T q_t K^-1/2
        q, k = norm(phi(conv(x W)))    v = silu(conv(x W))    beta = sigmoid(x W)    a_t = 1
        out = RMSNorm(y) W, the norm a head

    Delta rule: Schlag, Irie and Schmidhuber 2021, arXiv:2102.11174. conv is a causal depthwise convolution over 4
    tokens, without bias; phi is SiLU and norm the Euclidean length. The scale K^-1/2 is that of the authors' kernels;
    behind the output norm it matters only beside the norm's epsilon. Each head has its own output scale [V], where the
    authors' code shares one among the heads.

    The paper's ablations are options: feature_map ("elu" is elu + 1), qk_norm, short_conv None (v keeps its SiLU) and
    output_norm. Beyond the paper:
      decay_gate            a_t = exp(-exp(A_log) softplus(x W + dt_bias)): Gated DeltaNet, Yang et al. 2024,
                            arXiv:2412.06464, whose whole block is the mixer gated_delta
      output_gate           out = (RMSNorm(y) * silu(x W)) W, of the same paper
      negative_eigenvalues  beta = 2 sigmoid(x W), so that a write may reverse what the memory holds along k: Grazzi et
                            al. 2024, arXiv:2411.12537
    """

    modes = ("causal",)
    axes = 1
    packing = ("causal",)

    def __init__(
        self,
        width: int,
        *,
        causal: bool,
        num_heads: Positive = 8,
        head_dim: Positive | None = None,  # K; None: width / num_heads
        value_dim: Positive | None = None,  # V; None: K
        short_conv: Positive | None = 4,  # tokens the convolution sees; None: no convolution
        feature_map: Literal["silu", "elu", "relu", "identity"] = "silu",
        qk_norm: Literal["l2", "l1", "none"] = "l2",
        output_norm: bool = True,
        output_gate: bool = False,
        decay_gate: bool = False,
        negative_eigenvalues: bool = False,
        implementation: str | None = None,  # a name known to the op `delta_rule`
        rngs: nnx.Rngs,
    ):
        if not causal:
            raise ConfigError("causal", "the delta rule runs from left to right; wrap it in `bidirectional`")
        self.heads, self.key_dim = num_heads, head_width(width, num_heads, head_dim)
        self.value_dim = self.key_dim if value_dim is None else value_dim
        self.feature_map, self.qk_norm = feature_map, qk_norm
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        self.implementation = known_implementation(implementation, IMPLEMENTATIONS)
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim
        self.qkv = dense(width, 2 * keys + values, bias=False, rngs=rngs)
        self.beta = dense(width, num_heads, bias=False, rngs=rngs)
        fused: Literal["silu"] | None = "silu" if feature_map == "silu" else None  # for q, k and v, by the convolution
        make = functools.partial(ShortConv, 2 * keys + values, bias=False, activation=fused, rngs=rngs)
        self.conv = None if short_conv is None else make(size=short_conv)
        self.decay = DecayGate(width, num_heads, rngs=rngs) if decay_gate else None
        self.norm = HeadNorm(num_heads, self.value_dim, rngs=rngs) if output_norm else None
        self.gate = dense(width, values, bias=False, rngs=rngs) if output_gate else None
        self.out = dense(values, width, bias=False, rngs=rngs)

    def _heads(self, qkv: Float[Array, "B T N"]) -> list[Array]:
        """q, k and v behind the convolution: activated, normalised, q scaled."""
        keys, wide = 2 * self.heads * self.key_dim, qkv.astype(jnp.float32)
        qk, v = wide[..., :keys], wide[..., keys:]
        if self.conv is None or self.conv.activation is None:
            qk, v = FEATURES[self.feature_map](qk), nnx.silu(v)
        q, k = (_normalise(x, self.qk_norm) for x in split_heads(qk, sizes=(self.heads,) * 2, head_dim=self.key_dim))
        v = v.reshape(*v.shape[:2], self.heads, self.value_dim)
        return [x.astype(qkv.dtype) for x in (q * self.key_dim**-0.5, k, v)]

    def _strengths(
        self, x: Float[Array, "B T D"], keep: Array | None, segment_ids: Array | None
    ) -> tuple[Array, Array | None]:
        """beta and log_decay [B T H], float32: 0 on padding; -inf where a packed sequence begins."""
        beta = self.largest_beta * jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        log_decay = None if self.decay is None else self.decay(x)
        if keep is not None:
            beta = jnp.where(keep[..., None], beta, 0.0)
            log_decay = None if log_decay is None else jnp.where(keep[..., None], log_decay, 0.0)
        if segment_ids is not None:
            log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay
            log_decay = jnp.where(first_tokens(segment_ids)[..., None], -jnp.inf, log_decay)
        return beta, log_decay

    def _finish(self, y: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = join_heads(y if self.norm is None else self.norm(y))
        return self.out(y if self.gate is None else y * nnx.silu(self.gate(x)))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes along T. keep is False on padding, which then contributes nothing."""
        qkv = self.qkv(x) if self.conv is None else self.conv(self.qkv(x), keep=keep, segment_ids=segment_ids)
        q, k, v = self._heads(qkv)
        y, _ = delta_rule(q, k, v, *self._strengths(x, keep, segment_ids), implementation=self.implementation)
        return self._finish(y, x)

    def weights(self, x: Float[Array, "B T D"], *, keep: Bool[Array, "B T"] | None = None) -> Float[Array, "B H T T"]:
        """The lower triangular matrix A of y = A v: what the op makes of one-hot values. Rows do not sum to 1."""
        qkv = self.qkv(x) if self.conv is None else self.conv(self.qkv(x), keep=keep)
        q, k, _ = self._heads(qkv)
        one_hot = jnp.broadcast_to(jnp.eye(x.shape[1])[:, None], (*q.shape[:3], x.shape[1]))
        y, _ = delta_rule(q, k, one_hot, *self._strengths(x, keep, None), implementation=self.implementation)
        return jnp.swapaxes(y, 1, 2)

    def init_state(self, batch: int, max_length: int) -> State:
        memory = jnp.zeros((batch, self.heads, self.key_dim, self.value_dim), jnp.float32)
        return {"memory": memory} | ({} if self.conv is None else {"conv": self.conv.init_state(batch)})

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        qkv = self.qkv(x)
        after: State = {}
        if self.conv is not None:
            qkv, after["conv"] = self.conv.step(qkv, state["conv"])
        x = x[:, None]
        q, k, v = self._heads(qkv[:, None])
        y, after["memory"] = delta_rule(
            q, k, v, *self._strengths(x, None, None), state=state["memory"], implementation=self.implementation
        )
        return self._finish(y, x)[:, 0], after


class DecayGate(nnx.Module):
    """log of the decay a head: g = -exp(A_log) softplus(x W + dt_bias), float32 [B T H].

    A uniform in [0.01, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]: a memory of 1 to 1e5 tokens at first. The
    authors' code begins A at 0, where log A may be -inf.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.project = dense(width, heads, bias=False, rngs=rngs)
        low, high = np.log(1e-3), np.log(0.1)
        rate = jax.random.uniform(rngs.params(), (heads,), minval=0.01, maxval=16.0)
        step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
        bias = step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
        self.exact = Exact(A_log=jnp.log(rate), dt_bias=bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        exact = self.exact.read()
        step = jax.nn.softplus(self.project(x).astype(jnp.float32) + exact["dt_bias"])
        return -jnp.exp(exact["A_log"]) * step


def _normalise(x: Float[Array, "B T H K"], norm: str) -> Float[Array, "B T H K"]:
    """To length 1: x / sqrt(sum x^2 + eps) or x / max(sum |x|, eps)."""
    if norm == "l2":
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + EPS)
    if norm == "l1":
        return x / jnp.maximum(jnp.sum(jnp.abs(x), -1, keepdims=True), EPS)
    return x
