"""Softmax attention token mixer. Source: Vaswani et al. 2017, arXiv:1706.03762."""

import jax
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
from arch.registry import MIXERS
from arch.schema import Positive
from kernels_pallas.attention import IMPLEMENTATIONS, attention
from kernels_pallas.decode_attention import decode_attention


@MIXERS.register("softmax")
class Softmax(nnx.Module):
    """Every token reads a softmax-weighted mean of the values. O(T^2 K) per head, memory linear in T.

    With kv_heads < num_heads several query heads share a key-value head: grouped-query attention (Ainslie et al. 2023,
    arXiv:2305.13245). Its decode state, the cache of keys and values, grows with max_length.

    heads_at_once has so many heads projected, attended and added to the output at a time, one lot after the other: the
    same sum with the intermediate values of a lot in place of those of all, for layers of many heads on one device.
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
        bias: bool = False,
        heads_at_once: Positive | None = None,  # None: all of them
        implementation: str | None = None,  # a name known to the op `attention`
        rotary: Rotary | None = None,
        causal_chunk: int | None = None,  # of a causal mixer: see arch/mixers/contract.py
        rngs: nnx.Rngs,
    ):
        self.head_dim = head_width(width, num_heads, head_dim)
        self.heads, self.groups = num_heads, num_heads if kv_heads is None else kv_heads
        if self.heads % self.groups:
            raise ConfigError("kv_heads", f"{self.groups} does not divide num_heads {num_heads}")
        self.at_once = self.heads if heads_at_once is None else heads_at_once
        if self.heads % self.at_once or self.at_once % (self.heads // self.groups):
            raise ConfigError(
                "heads_at_once", f"{heads_at_once} is no part of {self.heads} heads with whole key heads; change it"
            )
        self.causal, self.rotary, self.causal_chunk = causal, rotary, causal_chunk
        self.implementation = known_implementation(implementation, IMPLEMENTATIONS)
        self.qkv = dense(width, (self.heads + 2 * self.groups) * self.head_dim, bias=bias, rngs=rngs)
        self.out = dense(self.heads * self.head_dim, width, bias=bias, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"], start: int | Int[Array, ""]) -> list[Array]:
        return self._split(self.qkv(x), (self.heads, self.groups, self.groups), start)

    def _split(self, qkv: Array, sizes: tuple[int, int, int], start: int | Int[Array, ""]) -> list[Array]:
        q, k, v = split_heads(qkv, sizes=sizes, head_dim=self.head_dim)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, start), self.rotary.rotate(k, start)
        return [q, k, v]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes along T. keep is False on padding, which nothing then attends to."""
        if self.at_once < self.heads:
            return self._in_lots(x, keep, segment_ids)
        return self.out(join_heads(self._attend(self._project(x, 0), keep, segment_ids)))

    def _attend(self, qkv: list[Array], keep: Array | None, segment_ids: Array | None) -> Array:
        length = qkv[0].shape[1]
        return attention(
            *qkv,
            causal=self.causal and self.causal_chunk is None,
            block_mask=None if self.causal_chunk is None else np.tri(length // self.causal_chunk, dtype=bool),
            keep=keep,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _in_lots(self, x: Array, keep: Array | None, segment_ids: Array | None) -> Array:
        """y = sum over lots of attend(x W_lot) W_out,lot; a lot of the matrices is cut out inside the loop."""
        groups = self.at_once * self.groups // self.heads
        sizes = (self.at_once, groups, groups)
        kernel = self.qkv.kernel[...].reshape(x.shape[-1], -1, self.head_dim)
        bias = None if self.qkv.bias is None else self.qkv.bias[...].reshape(-1, self.head_dim)
        out = self.out.kernel[...].reshape(self.heads // self.at_once, -1, x.shape[-1])

        def cut(matrix: Array, lot: Array, axis: int) -> Array:
            starts = (lot * self.at_once, self.heads + lot * groups, self.heads + self.groups + lot * groups)
            slices = [jax.lax.dynamic_slice_in_dim(matrix, at, n, axis) for at, n in zip(starts, sizes)]
            return jnp.concatenate(slices, axis).reshape(*matrix.shape[:axis], -1)

        def step(total: Array, lot: Array) -> tuple[Array, None]:
            qkv = x @ cut(kernel, lot, 1)
            qkv = qkv if bias is None else qkv + cut(bias, lot, 0)
            y = join_heads(self._attend(self._split(qkv, sizes, 0), keep, segment_ids))
            return total + jnp.matmul(y, out[lot], preferred_element_type=jnp.float32), None

        total, _ = jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), jnp.arange(self.heads // self.at_once))
        total = total if self.out.bias is None else total + self.out.bias[...]
        return total.astype(x.dtype)

    def read(
        self, x: Float[Array, "B T D"], count: int, *, keep: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B P D"]:
        """What __call__ gives at the first `count` tokens, P of them: the others need no query.

        Nor, while P H < G K and without rotary, does any token need a key or a value: q . (W_k x_s) = (W_k^T q) . x_s
        and sum_s p_s (W_v x_s) = W_v (sum_s p_s x_s), so the two matrices go to the P queries and O(T D P H) is left.
        A key's bias adds the same to all scores of a query and drops out of the softmax; a value's is added once.
        """
        if self.causal_chunk is not None:
            return self(x, keep=keep)[:, :count]
        if self.causal:  # the first tokens see no others
            return self(x[:, :count], keep=None if keep is None else keep[:, :count])
        cuts = [self.heads * self.head_dim, (self.heads + self.groups) * self.head_dim]
        kernels = jnp.split(self.qkv.kernel[...], cuts, axis=-1)
        biases = None if self.qkv.bias is None else jnp.split(self.qkv.bias[...], cuts)

        def project(x: Array, which: int) -> Array:  # [B T D] -> [B T H K]
            y = x @ kernels[which] if biases is None else x @ kernels[which] + biases[which]
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q = project(x[:, :count], 0)
        if self.rotary is not None or count * self.heads >= self.groups * self.head_dim:
            k, v = project(x, 1), project(x, 2)
            if self.rotary is not None:
                q, k = self.rotary.rotate(q, 0), self.rotary.rotate(k, 0)
            y = attention(q, k, v, causal=False, keep=keep, implementation=self.implementation)
            return self.out(join_heads(y))
        w_k, w_v = (kernel.reshape(-1, self.groups, self.head_dim) for kernel in kernels[1:])
        q = q.reshape(*q.shape[:2], self.groups, -1, self.head_dim)
        inward = jnp.einsum("bpgrk,dgk->bpgrd", q, w_k) * self.head_dim**-0.5
        scores = jnp.einsum("bpgrd,bsd->bpgrs", inward, x, preferred_element_type=jnp.float32)
        if keep is not None:
            scores = jnp.where(keep[:, None, None, None], scores, -jnp.inf)
        p = jax.nn.softmax(scores, axis=-1, where=None if keep is None else keep[:, None, None, None])
        y = jnp.einsum("bpgrd,dgk->bpgrk", jnp.einsum("bpgrs,bsd->bpgrd", p.astype(x.dtype), x), w_v)
        if biases is not None:
            y = y + biases[2].reshape(self.groups, 1, self.head_dim) * p.sum(-1, keepdims=True).astype(y.dtype)
        return self.out(y.reshape(*y.shape[:2], -1))

    def weights(self, x: Float[Array, "B T D"], *, keep: Bool[Array, "B T"] | None = None) -> Float[Array, "B H T S"]:
        """The matrix that multiplies the values, each row a sum of one. Quadratic: to look at, and to distil from."""
        q, k, _ = self._project(x, 0)
        visible = np.tri(x.shape[1], dtype=bool) if self.causal else np.ones((x.shape[1], x.shape[1]), bool)
        if self.causal_chunk is not None:
            place = np.arange(x.shape[1]) // self.causal_chunk
            visible = place[:, None] >= place[None]
        return masked_weights(q, k, visible[None], keep)

    def init_state(self, batch: int, max_length: int) -> State:
        cache = jnp.zeros((batch, max_length, self.groups, self.head_dim), self.qkv.kernel.dtype)
        return {"k": cache, "v": cache, "length": jnp.zeros((), jnp.int32)}

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One more token. Past max_length the last place of the cache is written over: do not go there."""
        if self.causal_chunk is not None:
            raise ConfigError("causal_chunk", "the tokens of a chunk see each other, so they come together: use extend")
        q, state = self._append(x[:, None], state)
        lengths = jnp.broadcast_to(state["length"], (x.shape[0],))
        y = decode_attention(q[:, 0], state["k"], state["v"], lengths)
        return self.out(y.reshape(x.shape[0], self.heads * self.head_dim)), state

    def extend(self, x: Float[Array, "B C D"], state: State) -> tuple[Float[Array, "B C D"], State]:
        """One more chunk, whose tokens see each other and all before."""
        q, state = self._append(x, state)
        seen = jnp.broadcast_to(jnp.arange(state["k"].shape[1]) < state["length"], state["k"].shape[:2])
        y = attention(q, state["k"], state["v"], causal=False, keep=seen, implementation=self.implementation)
        return self.out(join_heads(y)), state

    def _append(self, x: Float[Array, "B C D"], state: State) -> tuple[Float[Array, "B C H K"], State]:
        """The queries, and the state with the keys and values of the new tokens."""
        length = state["length"]
        q, k, v = self._project(x, length)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(state[name], new.astype(state[name].dtype), length, axis=1)
            for name, new in (("k", k), ("v", v))
        )
        return q, {"k": keys, "v": values, "length": length + x.shape[1]}
