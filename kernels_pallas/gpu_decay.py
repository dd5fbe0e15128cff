"""Decays of a chunk as the GPU kernels of linear_attention and delta_rule take them.

The difference of two sums since the start of a chunk would lose a weak decay behind a strong one. So a log decay is cut
into a multiple of 2^-6, whose sums and differences are exact in float32 up to 2^18 in size, and what is left, at most
2^-7, whose sums are too small to lose anything. FORGET for each of a chunk's tokens is 7040.
"""

import jax.numpy as jnp

from kernels_pallas.mosaic_gpu import ROWS, across, by_column, by_row, down, numbers

CHUNK = ROWS  # tokens
FORGET = -110.0  # exp of this is 0 in float32
COARSE, FINE, SINCE, UNTIL = range(4)  # rows of `decays`


def between(rows_s):
    """[t s]: exp(g_{s+1} + ... + g_t) where s <= t, else 0; without a decay 1 and 0."""
    shape = (CHUNK, CHUNK)
    visible = numbers(shape, 0) >= numbers(shape, 1)
    if rows_s is None:
        return jnp.where(visible, 1.0, 0.0)
    coarse = across(by_row(rows_s.at[COARSE]), shape) - down(by_column(rows_s.at[COARSE]), shape)
    fine = across(by_row(rows_s.at[FINE]), shape) - down(by_column(rows_s.at[FINE]), shape)
    return jnp.exp(jnp.where(visible, coarse + fine, FORGET))


def decays(g):
    """What the kernels read of g [B T H]: sums since the start of a chunk in two parts, coarse and fine, and exp of the
    sums since the start and until the end, [B N H 4 C].
    """
    batch, _, heads = g.shape
    g = g.astype(jnp.float32).reshape(batch, -1, CHUNK, heads).swapaxes(2, 3)  # [B N H C]
    coarse = jnp.round(g * 64.0) / 64.0
    coarse, fine = jnp.cumsum(coarse, -1), jnp.cumsum(g - coarse, -1)
    until = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    return jnp.stack([coarse, fine, jnp.exp(coarse + fine), jnp.exp(until)], -2)


def decay_gradient(parts, whole, rows):
    """dg [B T H] from the products of each factor that g enters and the factor's gradient.

    g_i lies between the pairs with s < i <= t, before the queries t >= i, after the keys s < i.

    Args:
      parts: [B N H 4 C]: of the pairs summed over s and over t, of the queries, of the keys.
      whole: [B N H K], of the states before and after a chunk, which the whole chunk lies between.
      rows: as `decays` gave them.
    """
    later, earlier, queries, keys = jnp.moveaxis(parts, 3, 0)  # [B N H C]
    up = queries + later - earlier
    up = jnp.cumsum(up[..., ::-1], -1)[..., ::-1]
    down = jnp.cumsum(keys, -1) - keys
    dg = up + down + (whole.sum(-1) * rows[..., SINCE, -1])[..., None]
    batch, _, heads, _ = dg.shape
    return dg.swapaxes(2, 3).reshape(batch, -1, heads)
