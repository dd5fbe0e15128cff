"""Linear attention as mixers use it: all modes behind one function, packing, and the matrix in full.

Source: Katharopoulos et al. 2020, arXiv:2006.16236. The causal recurrence is the op kernels_pallas/linear_attention.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arch.ops.segments import first_tokens
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.precision import exact

Features = Literal["elu", "relu", "exp", "silu", "identity"]
MOST = 30.0  # exponents of key features beyond +-MOST are cut: exp(30) = 1e13, its square times a long row is finite


def feature_map(name: Features) -> Callable[[Array], Array]:
    """phi of a query or key, element by element; in float32 as sums of its products divide."""
    return {
        "elu": lambda x: jax.nn.elu(x) + 1,
        "relu": jax.nn.relu,
        "exp": lambda x: jnp.exp(jnp.clip(x, -MOST, MOST)),
        "silu": jax.nn.silu,
        "identity": lambda x: x,
    }[name]


def positive(name: Features) -> bool:
    """Whether the sums of products of such features can be divided by."""
    return name in ("elu", "relu", "exp")


def resets(
    segment_ids: Int[Array, "B T"], log_decay: Float[Array, "B T H *K"] | None, heads: int
) -> Float[Array, "B T H *K"]:
    """The log decay with -inf, which forgets everything before, on the first token of each packed sequence."""
    first = first_tokens(segment_ids)[..., None]
    if log_decay is None:
        return jnp.broadcast_to(jnp.where(first, -jnp.inf, 0.0), (*segment_ids.shape, heads))
    return jnp.where(first[..., None] if log_decay.ndim == 4 else first, -jnp.inf, log_decay)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *,
    causal: bool,
    normalize: bool,
    keep: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """y_t = sum_s (q_t . k_s) v_s, over s <= t if causal, else over all s; divided by sum_s q_t . k_s if normalize.

    keep is False on padding keys. Packed sequences, told apart by segment_ids, do not see each other. Where the divisor
    is 0 (no kept key so far) y_t is 0. Sums run in float32; y has the dtype of v.
    """
    if not causal and segment_ids is None:
        return global_linear_attention(q, k, v, keep, normalize=normalize)
    if keep is not None:
        k = jnp.where(keep[:, :, None, None], k, 0)
    if not causal:
        return two_sided(q, k, v, segment_ids=segment_ids, normalize=normalize, implementation=implementation)
    log_decay = None if segment_ids is None else resets(segment_ids, None, q.shape[2])
    y, _ = linear_attention(q, k, v, log_decay, normalize=normalize, implementation=implementation)
    return y


def global_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    keep: Bool[Array, "B S"] | None = None,
    *,
    normalize: bool = True,
) -> Float[Array, "B T H V"]:
    """y_t = (sum_s k_s v_s^T)^T q_t / (q_t . sum_s k_s): every query sees every kept key. O(T K V) a head.

    Equation 6 of the paper. q and k come after the feature map, which must be positive (or the divisor may vanish).
    keep is False on padding keys. With no kept key, or q_t = 0, y_t is 0. Sums run in float32; y has the dtype of v.
    """
    if keep is not None:
        k = jnp.where(keep[:, :, None, None], k, 0)
    out, given = v.dtype, (q, k, v)
    q, k, v = (a.astype(jnp.float32) for a in given)  # XLA's CPU cannot run every product of bf16 into float32
    with exact(*given):
        y = jnp.einsum("bthk,bhkv->bthv", q, jnp.einsum("bshk,bshv->bhkv", k, v))
        if normalize:
            y = _divide(y, jnp.einsum("bthk,bhk->bth", q, k.sum(1))[..., None])
    return y.astype(out)


def two_sided(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *,
    log_decay: Float[Array, " H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """y_t = sum_s exp(|t - s| log_decay) (q_t . k_s) v_s over the segment of t, before and behind it.

    The sum over s <= t is one causal pass; that over s > t another over the reversed row, its keys one place late so
    that a token does not meet itself twice. Nothing is subtracted. A padding key is k = 0.
    """
    batch, length, heads, _ = q.shape
    if normalize:
        v = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1), v.dtype)], -1)

    def one_way(q: Array, k: Array, v: Array, ids: Array | None, *, late: bool) -> Array:
        g = None if log_decay is None else jnp.broadcast_to(log_decay, (batch, length, heads))
        if late:
            k, v = (jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :length] for x in (k, v))
            k = k if ids is None else jnp.where(first_tokens(ids)[:, :, None, None], 0, k)
        g = g if ids is None else resets(ids, g, heads)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return linear_attention(q, k, v, g, implementation=implementation)[0]

    ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
    behind = jnp.flip(one_way(jnp.flip(q, 1), jnp.flip(k, 1), jnp.flip(v, 1), ids, late=True), 1)
    if log_decay is not None:
        behind *= jnp.exp(log_decay)[:, None]
    y = one_way(q, k, v, segment_ids, late=False) + behind
    return (_divide(y[..., :-1], y[..., -1:]) if normalize else y).astype(v.dtype)


def mixing_matrix(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    *,
    causal: bool,
    normalize: bool,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    keep: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B H T T"]:
    """The matrix that multiplies the values, in full and float32: for looking at, distilling and tests. O(T^2).

    With a decay the entry (t, s) has the factor exp(g_{s+1} + ... + g_t), s <= t; without causal, that of (s, t) above
    the diagonal.
    """
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    length = q.shape[1]
    seen = jnp.asarray(np.tri(length, dtype=bool)) if causal else jnp.ones((length, length), bool)
    if log_decay is None:
        pairs = jnp.einsum("bthk,bshk->bhts", q, k)
    else:
        g = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        total = jnp.cumsum(g.astype(jnp.float32), axis=1).swapaxes(1, 2)  # [B H T (1 or K)]
        decay = jnp.exp(-jnp.abs(total[:, :, :, None] - total[:, :, None]))  # [B H T S (1 or K)]
        if log_decay.ndim == 4:
            pairs = jnp.einsum("bthk,bshk,bhtsk->bhts", q, k, decay)
        else:
            pairs = jnp.einsum("bthk,bshk->bhts", q, k) * decay[..., 0]
    if keep is not None:
        seen = seen & keep[:, None, None, :]
    pairs = jnp.where(seen, pairs, 0.0)
    return _divide(pairs, pairs.sum(-1, keepdims=True)) if normalize else pairs


def _divide(y: Array, total: Array) -> Array:
    """y / total, 0 where total is 0."""
    return jnp.where(total == 0, 0.0, y / jnp.where(total == 0, 1.0, total))
