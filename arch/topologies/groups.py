"""Tokens in groups: a sequence cut into equal runs, a grid into equal boxes, each group a row of its own."""

from math import prod

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped


def counts(axes: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """Groups along each token axis; the last of an axis may be filled up."""
    return tuple(-(-length // step) for length, step in zip(axes, size))


def cut(x: Shaped[Array, "B *A"], size: tuple[int, ...]) -> Shaped[Array, "B P ..."]:
    """[B *axes ...] to [B P *size ...], P groups in row-major order; zeros (False) where a group reaches beyond x.

    The token axes are the len(size) axes behind the batch: cut(x[B 6 8 D], (3, 4)) is [B 4 3 4 D].
    """
    axes, rest = x.shape[1 : 1 + len(size)], x.shape[1 + len(size) :]
    found = counts(axes, size)
    fill = [(0, n * step - length) for n, step, length in zip(found, size, axes)]
    if any(last for _, last in fill):
        x = jnp.pad(x, [(0, 0), *fill] + [(0, 0)] * len(rest))
    x = x.reshape(x.shape[0], *(n for pair in zip(found, size) for n in pair), *rest)
    order = _order(len(size), x.ndim)
    return x.transpose(order).reshape(x.shape[0], prod(found), *size, *rest)


def join(groups: Shaped[Array, "B P *N"], axes: tuple[int, ...], size: tuple[int, ...]) -> Shaped[Array, "B ..."]:
    """The inverse of cut: [B P *size ...] to [B *axes ...], what was filled up left out."""
    found, rest = counts(axes, size), groups.shape[2 + len(size) :]
    order = _order(len(size), 1 + 2 * len(size) + len(rest))
    x = groups.reshape(groups.shape[0], *found, *size, *rest).transpose([order.index(i) for i in range(len(order))])
    x = x.reshape(x.shape[0], *(n * step for n, step in zip(found, size)), *rest)
    for axis, length in enumerate(axes, start=1):
        x = x if x.shape[axis] == length else x.take(jnp.arange(length), axis=axis)
    return x


def _order(axes: int, ndim: int) -> list[int]:
    """Axes of [B n1 s1 n2 s2 ... rest] in the order B n1 n2 ... s1 s2 ... rest."""
    pairs = range(1, 1 + 2 * axes)
    return [0, *pairs[::2], *pairs[1::2], *range(1 + 2 * axes, ndim)]


def cut_keep(
    keep: Bool[Array, "B *A"] | None, batch: int, axes: tuple[int, ...], size: tuple[int, ...]
) -> Bool[Array, "B P ..."] | None:
    """Which tokens of the groups are real; None if all are."""
    if keep is None:
        if all(length % step == 0 for length, step in zip(axes, size)):
            return None
        keep = jnp.ones((batch, *axes), bool)
    return cut(keep, size)
