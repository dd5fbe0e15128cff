"""What the mixers with a fixed attention pattern share: projections, the dense matrix, decoding from a cache."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError
from arch.layers import dense
from arch.mixers.contract import State, head_width, known_implementation
from arch.ops.block_attention import masked_weights
from arch.ops.heads import join_heads, split_heads
from arch.positions import Rotary
from kernels_pallas.attention import IMPLEMENTATIONS, attention
from kernels_pallas.decode_attention import decode_attention


class PatternAttention(nnx.Module):
    """Softmax attention in which the places of a row, not its contents, decide which pairs of tokens are visible."""

    def __init__(
        self,
        width: int,
        *,
        causal: bool,
        num_heads: int,
        head_dim: int | None,
        kv_heads: int | None = None,
        bias: bool,
        implementation: str | None,
        rotary: Rotary | None,
        rngs: nnx.Rngs,
    ):
        self.head_dim = head_width(width, num_heads, head_dim)
        self.heads, self.groups = num_heads, num_heads if kv_heads is None else kv_heads
        if self.heads % self.groups:
            raise ConfigError("kv_heads", f"{self.groups} does not divide num_heads {num_heads}")
        self.causal, self.rotary = causal, rotary
        self.implementation = known_implementation(implementation, IMPLEMENTATIONS)
        self.qkv = dense(width, (self.heads + 2 * self.groups) * self.head_dim, bias=bias, rngs=rngs)
        self.out = dense(self.heads * self.head_dim, width, bias=bias, rngs=rngs)

    def visible(self, length: int) -> Bool[np.ndarray, "#H T T"]:
        """The pattern as a dense mask: which key each query sees, padding aside."""
        raise NotImplementedError

    def project(self, x: Float[Array, "B T D"], start: int | Int[Array, ""] = 0) -> list[Array]:
        """q [B T H K], k and v [B T G K], turned to their positions if the model's are rotary."""
        return self._split(self.qkv(x), start)

    def _split(self, qkv: Float[Array, "B T E"], start: int | Int[Array, ""]) -> list[Array]:
        q, k, v = split_heads(qkv, sizes=(self.heads, self.groups, self.groups), head_dim=self.head_dim)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, start), self.rotary.rotate(k, start)
        return [q, k, v]

    def weights(self, x: Float[Array, "B T D"], *, keep: Bool[Array, "B T"] | None = None) -> Float[Array, "B H T S"]:
        """The matrix that multiplies the values, from the whole masked score matrix. Quadratic, to look at."""
        q, k, _ = self.project(x)
        return masked_weights(q, k, self.visible(x.shape[1]), keep)

    def cache(self, batch: int, size: int) -> State:
        """Keys and values of `size` tokens, and the number of tokens so far."""
        empty = jnp.zeros((batch, size, self.groups, self.head_dim), self.qkv.kernel.dtype)
        return {"k": empty, "v": empty, "length": jnp.zeros((), jnp.int32)}

    def step_in_ring(
        self, x: Float[Array, "B D"], state: State, place: Array, count: Array
    ) -> tuple[Float[Array, "B D"], State]:
        """One more token, written at `place` of the cache; it sees the first `count` places."""
        q, state = self._write(x, state, place)
        lengths = jnp.broadcast_to(count, (x.shape[0],))
        y = decode_attention(q[:, 0], state["k"], state["v"], lengths)
        return self.out(y.reshape(x.shape[0], self.heads * self.head_dim)), state

    def _write(self, x: Array, state: State, place: Array) -> tuple[Array, State]:
        """The query [B 1 H K], and the state with the token's key and value."""
        q, k, v = self.project(x[:, None], state["length"])
        keys = jnp.asarray(state["k"]).at[:, place].set(k[:, 0].astype(state["k"].dtype))
        values = jnp.asarray(state["v"]).at[:, place].set(v[:, 0].astype(state["v"].dtype))
        return q, {"k": keys, "v": values, "length": state["length"] + 1}

    def step_in_cache(
        self, x: Float[Array, "B D"], state: State, place: Array, seen: Bool[Array, " S"] | Bool[Array, "H S"]
    ) -> tuple[Float[Array, "B D"], State]:
        """One more token, written at `place` of the cache; it sees the places where `seen` is True."""
        q, state = self._write(x, state, place)
        bias = jnp.where(jnp.atleast_2d(seen), 0.0, -jnp.inf)[None, :, None]  # [1 1|H 1 S]
        y = attention(q, state["k"], state["v"], causal=False, bias=bias, implementation=self.implementation)
        return self.out(join_heads(y))[:, 0], state
