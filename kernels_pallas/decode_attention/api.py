"""Attention of one new token: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.decode_attention.chunked import decode_attention_chunked
from kernels_pallas.decode_attention.pallas_tpu import decode_attention_tpu
from kernels_pallas.decode_attention.ref import decode_attention_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": decode_attention_ref,
    "chunked": decode_attention_chunked,
    "pallas_tpu": decode_attention_tpu,
}
AUTO = {"tpu": ("pallas_tpu", "chunked"), "default": ("chunked",)}  # in order of preference
AXES = Axes(ins=("BH.", "B.H.", "B.H.", "B"), outs=("BH.",))


def decode_attention(
    q: Float[Array, "B H K"],
    k_cache: Float[Array, "B S G K"],
    v_cache: Float[Array, "B S G V"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B H V"]:
    """y = sum_s p_s v_s over the first `lengths` places of the cache, p = softmax_s(scale q . k_s). O(S H K) a row.

    Source: Vaswani et al. 2017, arXiv:1706.03762, one query; split over the cache as in flash-decoding (Dao, Haziza,
    Massa and Sizov 2023), each part by the online softmax of arXiv:2205.14135. Grouped heads: arXiv:2305.13245.

    Args:
      q: the query of the newest token, any float dtype; head h reads key head h // (H / G), so G must divide H.
      k_cache, v_cache: what stands at place s >= lengths of a row has weight 0; it must be finite, as zeros are.
      lengths: how many keys each row has, the newest token's own among them, at most S; 0 gives 0.
      window: only the newest `window` of them are seen; None: all.
      scale: K ** -0.5 if None.
      implementation: a key of IMPLEMENTATIONS; None takes the first in AUTO that does not refuse.

    Returns:
      y in the dtype of v_cache. Sums run in float32 whatever the inputs. The gradient is that of `chunked`.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, heads, width = q.shape
    keys, groups = k_cache.shape[1:3]
    if groups == 0 or heads % groups:
        raise ValueError(f"decode_attention: {groups} key heads do not divide {heads} query heads")
    if (len(k_cache), k_cache.shape[3]) != (batch, width) or v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"decode_attention: q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape} do not fit")
    if lengths.shape != (batch,):
        raise ValueError(f"decode_attention: lengths {lengths.shape} must be {(batch,)}, one a row of q")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window must be at least 1 or None, got {window}")
    if 0 in (batch, heads, keys):
        dispatch.check("decode_attention", IMPLEMENTATIONS, implementation)
        return jnp.zeros((batch, heads, v_cache.shape[-1]), v_cache.dtype)
    with jax.named_scope("decode_attention"):
        (y,) = dispatch.call(
            "decode_attention",
            IMPLEMENTATIONS,
            implementation,
            AUTO,
            *(q, k_cache, v_cache, jnp.clip(lengths.astype(jnp.int32), 0, keys)),
            axes=AXES,
            dtypes=(v_cache.dtype,),
            window=window,
            scale=width**-0.5 if scale is None else scale,
        )
    return y
