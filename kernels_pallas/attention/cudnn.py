"""cuDNN's fused attention, through jax.nn.dot_product_attention; NVIDIA GPUs, bfloat16 and float16."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

WIDEST = 256  # head, on Hopper


def attention_cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    bias: Float[Array, "#B #H #T #S"] | None,
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    window: tuple[int | None, int | None],
    block_mask: Bool[np.ndarray, "J M N"] | None,
    scale: float,
    activation: str,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """y of api.attention. lse is NaN: cuDNN's has no gradient, and jax rounds it to the dtype of y; so the public
    function refuses cuDNN where return_lse asks for it.

    Raises:
      NotImplementedError: what cuDNN does not take, or takes another way: it aligns causal queries with the first keys
        (the same if T = S), masks by arrays as large as the scores, and its windows end at the query.
    """
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        raise NotImplementedError("attention: cuDNN takes bfloat16 or float16, all alike")
    if activation != "softmax" or bias is not None or block_mask is not None:
        raise NotImplementedError("attention: cuDNN is used for the softmax without a bias and without a block mask")
    if keep is not None or q_segments is not None:
        raise NotImplementedError("attention: cuDNN would need a mask as large as the scores for padding or segments")
    width, deep = q.shape[-1], v.shape[-1]
    if width != deep or width % 8 or width > WIDEST:
        raise NotImplementedError(
            f"attention: cuDNN takes heads of K = V, a multiple of 8 up to {WIDEST}, not K {width} and V {deep}"
        )
    left, right = window
    if right not in (None, 0) or (left is not None and right is None):
        raise NotImplementedError(f"attention: cuDNN's windows end at the query (causal), not at {right}")
    if right == 0 and q.shape[1] != k.shape[1]:
        raise NotImplementedError(
            f"attention: causal, cuDNN puts the first query beside the first key; T={q.shape[1]} and S={k.shape[1]} "
            "must be equal"
        )
    try:
        y = jax.nn.dot_product_attention(
            *(q, k, v),
            scale=scale,
            is_causal=right == 0,
            local_window_size=None if left is None else (left, 0),
            implementation="cudnn",
        )
    except RuntimeError as missing:
        raise NotImplementedError(
            f"attention: jax does not find cuDNN where the program is traced ({missing}); install jax[cuda13]"
        ) from missing
    return y, jnp.full(q.shape[:3], jnp.nan, jnp.float32)
