"""Cross-attention in a residual: one set of tokens reads another of its own width."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from arch.errors import ConfigError
from arch.layers import dense
from arch.ops.heads import join_heads, split_heads
from arch.topologies.block import Residual
from arch.topologies.parts import Parts
from kernels_pallas.attention import attention


class Cross(nnx.Module):
    """x + W_o attention(W_q norm(x), W_k norm(y), W_v norm(y)): the tokens x[B T D] read the tokens y[B S E].

    As wide inside as the narrower of the two. With the norm behind the residual ("post") y is read as it is. Where no y
    is real, x stays as it is.
    """

    part = "cross-attention"  # in the table of costs

    def __init__(
        self, parts: Parts, *, width: int, source_width: int, num_heads: int, rngs: nnx.Rngs, field: str = "cross_heads"
    ):
        inner = min(width, source_width)
        if inner % num_heads:
            raise ConfigError(field, f"{num_heads} does not divide {inner}, the narrower of the two widths; change one")
        self.heads, self.head_dim = num_heads, inner // num_heads
        self.residual = Residual(parts.norm(width), parts.placement, parts.dropout, rngs=rngs)
        self.norm_source = parts.norm(source_width) if parts.placement == "pre" else None
        self.q = dense(width, inner, bias=False, rngs=rngs)
        self.kv = dense(source_width, 2 * inner, bias=False, rngs=rngs)
        self.out = dense(inner, width, bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        source: Float[Array, "B S E"],
        keep: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """keep is False on tokens of the source that are not to be read."""
        source = source if self.norm_source is None else self.norm_source(source)

        def read(x: Array) -> Array:
            (q,) = split_heads(self.q(x), sizes=(self.heads,), head_dim=self.head_dim)
            k, v = split_heads(self.kv(source), sizes=(self.heads, self.heads), head_dim=self.head_dim)
            return self.out(join_heads(attention(q, k, v, causal=False, keep=keep)))

        with jax.named_scope("cross"):
            return self.residual(x, read)
