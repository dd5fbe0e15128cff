"""Attention: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention.chunked import attention_chunked
from kernels_pallas.attention.cudnn import attention_cudnn
from kernels_pallas.attention.pallas_gpu import attention_gpu
from kernels_pallas.attention.pallas_tpu import attention_tpu
from kernels_pallas.attention.ref import attention_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": attention_ref,
    "chunked": attention_chunked,
    "pallas_tpu": attention_tpu,
    "pallas_gpu": attention_gpu,  # not in AUTO until its time on a GPU is on record
    "cudnn": attention_cudnn,
}
AUTO = {  # by platform, in order of preference; chunked differs on a CPU
    "tpu": ("pallas_tpu", "chunked"),
    "cpu": ("chunked",),
    "cuda": ("cudnn", "chunked"),
    "default": ("chunked",),
}

Window = tuple[int | None, int | None]
Pair = tuple[Array, Array]


@overload
def attention(q: Array, k: Array, v: Array, *, causal: bool, return_lse: Literal[True], **options: Any) -> Pair: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, causal: bool, return_lse: Literal[False] = False, **options: Any
) -> Array: ...
def attention(  # type: ignore[misc]  # the options of the overloads are those below
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool,
    window: Window | None = None,
    block_mask: Bool[np.ndarray, "M N"] | Bool[np.ndarray, "H M N"] | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    keep: Bool[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    scale: float | None = None,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """y_t = sum_s P_ts v_s over the visible keys; P_t = softmax_s(scale q_t . k_s + bias_ts), or the sigmoid of each.

    Source: Vaswani et al. 2017, arXiv:1706.03762; computed as in FlashAttention, arXiv:2205.14135. Sigmoid:
    Ramapuram et al. 2024, arXiv:2409.04431 (pass their bias -log S as `bias`). Grouped heads: arXiv:2305.13245.

    Query t stands at key position t + S - T: the last query beside the last key. A query with no visible key gives 0.

    Args:
      q, k, v: any float dtype; query head h reads key head h // (H / G), so G must divide H.
      causal: key s is visible to query t if s <= t + S - T; needs S >= T.
      window: (left, right): key s is visible if -left <= s - (t + S - T) <= right; None leaves that side open.
      block_mask: NumPy, so known when tracing: True where a query block may see a key block. M divides T, N divides
        S; every block is (T / M) x (S / N). Blocks outside are skipped, not computed and masked, where a tile allows.
      bias: added to the scaled scores; axes of length 1 broadcast. It has a gradient.
      keep: False on padding keys, which are then never visible.
      segment_ids: key and query must share the id; one array if T = S, else a pair (of queries, of keys).
      scale: K ** -0.5 if None.
      return_lse: also return log sum_s exp(score_ts), float32 [B T H], -inf where no key is visible.
      implementation: a key of IMPLEMENTATIONS; None takes the first in AUTO that does not refuse.

    Returns:
      y in the dtype of v (or y and lse). Sums run in float32 whatever the inputs.

    Raises:
      ValueError: arguments that contradict each other. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    if groups == 0 or heads % groups:
        raise ValueError(f"attention: {groups} key heads do not divide {heads} query heads")
    if len(k) != batch or k.shape[-1] != width or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if causal and keys < queries:
        raise ValueError(f"attention: causal needs at least as many keys as queries, got T={queries} and S={keys}")
    if return_lse and activation != "softmax":
        raise ValueError("attention: return_lse needs activation='softmax'; the sigmoid has no normaliser")
    if return_lse and implementation == "cudnn":
        raise NotImplementedError("attention: return_lse: cuDNN's lse has no gradient; use another implementation")
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"attention: activation must be 'softmax' or 'sigmoid', got {activation!r}")
    left, right = _window(window, causal)
    q_segments: Array | None
    k_segments: Array | None
    if isinstance(segment_ids, tuple):
        q_segments, k_segments = segment_ids
    else:
        if segment_ids is not None and keys != queries:
            raise ValueError(f"attention: T={queries} and S={keys} differ, so segment_ids must be a pair")
        q_segments = k_segments = segment_ids
    if (q_segments is None) != (k_segments is None):
        raise ValueError("attention: segment_ids needs the ids of both, queries and keys, or None")
    told = ("keep", keep, keys), ("segment_ids", q_segments, queries), ("segment_ids of the keys", k_segments, keys)
    for name, marks, length in told:
        if marks is not None and marks.shape != (batch, length):
            raise ValueError(f"attention: {name} {marks.shape} must be {(batch, length)}")
    if block_mask is not None:
        block_mask = _block_mask(block_mask, heads, queries, keys)
    if bias is not None:
        full = (batch, heads, queries, keys)
        if bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, full)):
            raise ValueError(f"attention: bias {bias.shape} does not broadcast to [B H T S] = {full}")
    if 0 in (batch, queries, heads, keys):  # nothing to attend: zeros, as for any query without a visible key
        dispatch.check("attention", IMPLEMENTATIONS, implementation)
        y = jnp.zeros((batch, queries, heads, v.shape[-1]), v.dtype)
        return (y, jnp.full((batch, queries, heads), -jnp.inf, jnp.float32)) if return_lse else y
    with jax.named_scope("attention"):  # for profiles and counts of FLOPs
        y, lse = dispatch.call(
            "attention",
            IMPLEMENTATIONS,
            implementation,
            AUTO | {"cuda": ("chunked",)} if return_lse else AUTO,
            *(q, k, v, bias, keep, q_segments, k_segments),
            window=(left, right),
            block_mask=block_mask,
            scale=width**-0.5 if scale is None else scale,
            activation=activation,
            axes=_axes(block_mask, activation),
        )
    return (y, lse) if return_lse else y


def _window(window: Window | None, causal: bool) -> Window:
    """The visible offsets s - (t + S - T) as (left, right), with causal folded in as right = 0."""
    left, right = (None, None) if window is None else window
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"attention: window {name} must be at least 0 or None, got {side}")
    return left, (0 if causal else right)


def _axes(block_mask: np.ndarray | None, activation: str) -> Axes:
    """How the arrays are cut over a mesh; a block mask of its own for every head keeps the heads together."""
    ins: tuple[str, ...] = ("B.H.", "B.H.", "B.H.", "BH..", "B.", "B.", "B.")
    lse = "B.H"
    if block_mask is not None and len(block_mask) > 1:
        ins, lse = tuple(letters.replace("H", ".") for letters in ins), "B.."
    return Axes(ins, (ins[0], lse if activation == "softmax" else None))


def _block_mask(mask: np.ndarray, heads: int, queries: int, keys: int) -> np.ndarray:
    """The block mask as [1 or H, M, N]."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise ValueError("attention: block_mask must be a NumPy array of bool, so that blocks can be left out")
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or mask.shape[0] not in (1, heads) or queries % mask.shape[1] or keys % mask.shape[2]:
        raise ValueError(
            f"attention: block_mask {mask.shape} must be [M N] or [H M N], M dividing T={queries} and N S={keys}"
        )
    return mask
