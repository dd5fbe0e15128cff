"""Mixture of experts, a channel mixer: every token goes through k of E feed-forwards.

Sources: Shazeer et al. 2017, arXiv:1701.06538 (gates over the best k); Lepikhin et al. 2020, arXiv:2006.16668 (groups
with a capacity); Fedus et al. 2021, arXiv:2101.03961 (balance loss, jitter, float32 router); Zoph et al. 2022,
arXiv:2202.08906 (z-loss); Riquelme et al. 2021, arXiv:2106.05974 (noise of a fixed size).
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.auxiliary import add_loss
from arch.channel_mixers import ACTIVATIONS, hidden_width
from arch.errors import ConfigError
from arch.layers import NEARLY_ZERO, Dropout, Exact
from arch.ops.expert_routing import assign, combine, dispatch
from arch.registry import CHANNEL_MIXERS
from arch.schema import NonNegativeFloat, Positive, PositiveFloat, Rate

XAVIER_EACH = nnx.initializers.xavier_uniform(batch_axis=0)  # of one expert's own sizes
GATED = {"swiglu": "silu", "geglu": "gelu"}


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a batch go. P = E C places, as in arch/ops/expert_routing.py."""

    gates: Float[Array, "B T k"]
    place: Int[Array, "B T k"]
    choice: Int[Array, "B P"]
    shares: Float[Array, " E"]  # of all choices of the batch, before any is dropped; they sum to 1
    dropped: Float[Array, ""]  # share of the choices that found their expert full
    balance: Float[Array, ""]  # E sum_e f_e P_e: 1 when even, up to E
    z: Float[Array, ""]  # mean of logsumexp(logits)^2


@CHANNEL_MIXERS.register("moe")
class MoE(nnx.Module):
    """y_t = sum over the k experts e with the largest p_te of p_te FFN_e(x_t),  p_t = softmax(x_t W) in float32.

    FFN_e is an MLP, W_2 activation(W_1 x + b_1) + b_2, or with "swiglu" and "geglu" the gated one without biases.
    renormalize divides the k gates by their sum (GShard, Mixtral); without it the model learns how much an expert adds
    (Switch, WideNet).

    Capacity. Every row (a sequence, or a grid in row-major order) is a group of its own: an expert takes at most
    C = ceil(capacity k T / E) of its T tokens, at least 1, in their order, all k choices of a token before those of
    the next. So the other rows of a batch and later tokens change nothing, and a causal model stays causal. A choice
    beyond C is dropped and adds 0: a token that has lost all passes by in the residual unchanged. Padding is not
    routed, takes no place and gives 0. capacity = E / k never drops. In decoding each token is a row of length 1, where
    nothing is dropped; it equals the parallel form wherever that drops nothing. Sequences packed in one row share its
    places, the earlier ones first.

    Losses, added to the task's: balance * E sum_e f_e P_e, f_e the share of the choices that fall on expert e before
    any is dropped (no gradient), P_e the mean of p_te; z_loss * mean_t logsumexp(x_t W)^2. The means run over all
    tokens of the batch but padding, wherever its rows are: in one program over a sharded batch they are global.

    Only in training: jitter multiplies what the router reads by U(1 - jitter, 1 + jitter), noise adds N(0, noise^2) to
    its logits. O(k capacity D H) a token, whatever E.

    Differences: Shazeer's noise has a learnt size and its two losses are others; GShard drops in the order of ranks,
    first all first choices, and takes the second expert at random; Switch's groups are the tokens of a device.
    """

    masked = True  # called with keep

    def __init__(
        self,
        width: int,
        *,
        experts: Positive = 8,  # E
        top_k: Positive = 2,  # k
        capacity: PositiveFloat = 1.25,
        ratio: PositiveFloat | None = None,  # H / D of an expert; None: 4, gated 8/3
        hidden: Positive | None = None,  # H; overrides ratio
        activation: Literal["gelu", "relu", "silu", "swiglu", "geglu"] = "gelu",
        bias: bool = True,  # of experts that are not gated
        renormalize: bool = False,
        balance: NonNegativeFloat = 0.01,
        z_loss: NonNegativeFloat = 0.0,
        jitter: Rate = 0.0,
        noise: NonNegativeFloat = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if top_k > experts:
            raise ConfigError("top_k", f"a token cannot go to {top_k} of {experts} experts; give at most {experts}")
        if renormalize and top_k == 1:
            raise ConfigError("renormalize", "makes the gate of a single expert 1, and the router learns no task")
        gated = activation in GATED
        inner = hidden_width(width, ratio if ratio is not None else 8 / 3 if gated else 4.0, hidden)
        self.experts, self.top_k, self.capacity, self.renormalize = experts, top_k, capacity, renormalize
        self.balance, self.z_loss = balance, z_loss
        self.activation = ACTIVATIONS[GATED.get(activation, activation)]
        self.noise = RouterNoise(jitter, noise, rngs=rngs)
        self.exact = Exact(router=nnx.initializers.xavier_uniform()(rngs.params(), (width, experts)))
        self.up = Experts(experts, width, inner, bias=bias and not gated, rngs=rngs)
        self.gate = Experts(experts, width, inner, bias=False, rngs=rngs) if gated else None
        self.dropout = Dropout(dropout, rngs=rngs)
        self.down = Experts(experts, inner, width, bias=bias and not gated, rngs=rngs)

    def __call__(self, x: Float[Array, "*A D"], *, keep: Bool[Array, "*A"] | None = None) -> Float[Array, "*A D"]:
        """x is [B *A D], rows first, or [B D]: rows of one token."""
        if not x.size:
            return x
        rows = _rows(x.shape)
        tokens = x.reshape(*rows, x.shape[-1])
        routing = self.route(tokens, None if keep is None else keep.reshape(rows))
        add_loss(self, self.balance * routing.balance + self.z_loss * routing.z)
        _report(routing)
        batch, all_places, width = rows[0], routing.choice.shape[1], x.shape[-1]
        places = all_places // self.experts
        taken = dispatch(tokens, routing.place, routing.choice).reshape(batch, self.experts, places, width)
        y = self._feed_forward(taken.swapaxes(0, 1).reshape(self.experts, batch * places, width))  # a product an expert
        y = y.reshape(self.experts, batch, places, width).swapaxes(0, 1).reshape(batch, all_places, width)
        return combine(y, routing.gates, routing.place, routing.choice).reshape(x.shape)

    def _feed_forward(self, x: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        hidden = self.up(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.down(self.dropout(hidden))

    def route(self, x: Float[Array, "B T D"], keep: Bool[Array, "B T"] | None = None) -> Routing:
        """The experts of every token; keep is False on padding."""
        with jax.named_scope("router"):
            keep = jnp.ones(x.shape[:2], bool) if keep is None else keep
            logits = self.noise.logits(self.noise.inputs(x.astype(jnp.float32)) @ self.exact.read()["router"])
            p = jax.nn.softmax(logits)
            experts = jax.lax.top_k(jax.lax.stop_gradient(p), self.top_k)[1]
            gates = jnp.take_along_axis(p, experts, axis=-1)
            if self.renormalize:
                gates = gates / gates.sum(axis=-1, keepdims=True)
            places = capacity_of(self.capacity, self.top_k, self.experts, x.shape[1])
            place, choice = assign(experts, keep, num_experts=self.experts, places=places)
            count = jnp.maximum(keep.sum(), 1)
            chosen = jax.nn.one_hot(experts, self.experts).sum(axis=2)
            shares = jnp.einsum("bte,bt->e", chosen, keep.astype(jnp.float32)) / (count * self.top_k)
            means = jnp.einsum("bte,bt->e", p, keep.astype(jnp.float32)) / count
            lost = (place == choice.shape[1]) & keep[..., None]
            return Routing(
                gates=gates,
                place=place,
                choice=choice,
                shares=shares,
                dropped=lost.sum() / (count * self.top_k),
                balance=self.experts * jnp.sum(shares * means),
                z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * keep) / count,
            )


class Experts(nnx.Module):
    """x_e W_e (+ b_e) for every expert e: kernel [E D H], each Xavier-uniform in its own D and H."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(XAVIER_EACH(rngs.params(), (experts, inputs, outputs)))
        self.bias = nnx.Param(NEARLY_ZERO(rngs.params(), (experts, outputs))) if bias else None

    def __call__(self, x: Float[Array, "E N D"]) -> Float[Array, "E N H"]:
        y = jnp.einsum("end,edh->enh", x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...][:, None]


class RouterNoise(nnx.Module):
    """The router's randomness; nothing when deterministic. Without any it holds no random state."""

    def __init__(self, jitter: float, noise: float, *, rngs: nnx.Rngs):
        self.jitter, self.noise, self.deterministic = jitter, noise, False
        self.stream = rngs["dropout"].fork() if jitter or noise else None

    def inputs(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.deterministic or not self.jitter or self.stream is None:
            return x
        return x * jax.random.uniform(self.stream(), x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)

    def logits(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        if self.deterministic or not self.noise or self.stream is None:
            return x
        return x + self.noise * jax.random.normal(self.stream(), x.shape)


def capacity_of(factor: float, top_k: int, experts: int, length: int) -> int:
    """Places of an expert in a row of `length` tokens: ceil(factor k T / E), from 1 to T."""
    return max(1, min(length, math.ceil(round(factor * top_k * length / experts, 6))))  # 1.2 * 5 is not quite 6


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and tokens a row of an array [B *A D]; [B D] has rows of one token, [D] is one."""
    batch = shape[0] if len(shape) > 1 else 1
    return batch, math.prod(shape[1:-1])


@dataclass(frozen=True)
class Balance:
    """How evenly one call of a mixture used its experts."""

    shares: Any  # numpy [E], of the choices, before any is dropped
    dropped: float  # share of the choices that found their expert full

    @property
    def largest(self) -> float:
        """The largest share; 1 / E when even."""
        return float(self.shares.max())


_WATCHED: contextvars.ContextVar[list[Balance] | None] = contextvars.ContextVar("watched mixtures", default=None)


@contextlib.contextmanager
def watch() -> Iterator[list[Balance]]:
    """Within it, every mixture that runs adds a Balance to the list, in the order of layers; it is whole at the end.

    A function that jit compiled before does not report: call the model as it is, or jit it within.
    """
    seen: list[Balance] = []
    token = _WATCHED.set(seen)
    try:
        yield seen
        jax.effects_barrier()
    finally:
        _WATCHED.reset(token)


def _report(routing: Routing) -> None:
    seen = _WATCHED.get()
    if seen is not None:
        add = lambda shares, dropped: seen.append(Balance(shares, float(dropped)))  # noqa: E731
        jax.debug.callback(add, routing.shares, routing.dropped, ordered=True)
