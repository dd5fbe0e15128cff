"""Linear attention: the public function, its checks and the choice of implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.linear_attention.chunked import linear_attention_chunked
from kernels_pallas.linear_attention.pallas_gpu import linear_attention_gpu
from kernels_pallas.linear_attention.pallas_tpu import linear_attention_tpu
from kernels_pallas.linear_attention.ref import linear_attention_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": linear_attention_ref,
    "chunked": linear_attention_chunked,
    "pallas_tpu": linear_attention_tpu,
    "pallas_gpu": linear_attention_gpu,  # not in AUTO until its time on a GPU is on record
}


def _with_column(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """normalize for an implementation without it: the sum of the keys is what comes of a column of ones in v."""

    @functools.wraps(implementation)
    def run(q: Array, k: Array, v: Array, log_decay: Array | None, state: Array) -> tuple[Array, Array]:
        v = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1), v.dtype)], -1)
        y, state = implementation(q, k, v, log_decay, state)
        y, total = y[..., :-1].astype(jnp.float32), y[..., -1:].astype(jnp.float32)
        return jnp.where(total == 0, 0.0, y / jnp.where(total == 0, 1.0, total)), state

    return run


def _tpu_normalized(q: Array, k: Array, v: Array, log_decay: Array | None, state: Array) -> tuple[Array, Array]:
    """In the kernel, but with a decay a channel."""
    if log_decay is not None and log_decay.ndim == 4:
        return _with_column(linear_attention_tpu)(q, k, v, log_decay, state)
    return linear_attention_tpu(q, k, v, log_decay, state, normalize=True)


NORMALIZED = {name: _with_column(run) for name, run in IMPLEMENTATIONS.items()} | {"pallas_tpu": _tpu_normalized}
AUTO = {
    "tpu": ("pallas_tpu", "chunked"),
    "cpu": ("chunked",),
    "default": ("chunked",),
}  # in order of preference; chunked differs on a CPU


def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    state: Float[Array, "B H K W"] | None = None,
    *,
    normalize: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K W"]]:
    """Causal linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  y_t = S_t^T q_t.

    Source: Katharopoulos et al. 2020, arXiv:2006.16236 (g = 0); with a scalar g_t a head RetNet, arXiv:2307.08621,
    and Mamba-2, arXiv:2405.21060; with a vector g_t GLA, arXiv:2312.06635.

    normalize divides y_t by z_t . q_t, where z_t = exp(g_t) z_{t-1} + k_t is the decayed sum of the keys. It is
    carried as one more column of the state, as if v had a column of ones: W = V + 1 with normalize, else W = V.
    Where z_t . q_t is 0 (only padding so far, with k = 0) y_t is 0.

    Args:
      q, k: queries and keys after the feature map, any float dtype; not rescaled here. A padding key is k = 0.
      v: values.
      log_decay: g, at most 0; one a head, or one a head and key channel. None is 0. -inf forgets all before t.
      state: S_0 in float32, zeros if None.
      implementation: a key of IMPLEMENTATIONS; None takes the first in AUTO that does not refuse.

    Returns:
      y in the dtype of v, and S_T in float32 (S_0 if T = 0). Sums run in float32 whatever the inputs.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, _, heads, width = q.shape
    columns = v.shape[-1] + normalize
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"linear_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
        raise ValueError(f"linear_attention: log_decay {log_decay.shape} must be [B T H] or [B T H K] of q {q.shape}")
    if state is None:
        state = jnp.zeros((batch, heads, width, columns), jnp.float32)
    if state.shape != (batch, heads, width, columns):
        extra = " (with normalize the last column carries the sum of the keys)" if normalize else ""
        raise ValueError(f"linear_attention: state {state.shape} must be {(batch, heads, width, columns)}{extra}")
    state = state.astype(jnp.float32)
    if 0 in v.shape or width == 0:
        dispatch.check("linear_attention", IMPLEMENTATIONS, implementation)
        y = jnp.zeros(v.shape, jnp.float32)
    else:
        y, state = dispatch.call(
            "linear_attention",
            NORMALIZED if normalize else IMPLEMENTATIONS,
            implementation,
            AUTO,
            *(q, k, v, log_decay, state),
            axes=Axes(
                ("B.H.", "B.H.", "B.H.", None if log_decay is None else "B.H."[: log_decay.ndim], "BH.."),
                ("B.H.", "BH.."),
            ),
            dtypes=(jnp.float32, jnp.float32),
        )
    return y.astype(v.dtype), state
