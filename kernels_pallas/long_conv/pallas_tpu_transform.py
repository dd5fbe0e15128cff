"""The Fourier transform of the long convolution's TPU kernels: two matrix products, in place; README.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.long_conv.tiles import COLUMNS, GROUP, LANES, TOGETHER


@functools.lru_cache
def tables(rows: int, parts: int) -> tuple[np.ndarray, ...]:
    """For N = N1 N2 points, each as `parts` bfloat16 tables side by side, real above imaginary:

    exp(-2 pi i (k1 + 1/4) (n1 / N1 + 8 a / N)) as [N2/8, 2 N1, N1], the transform over n1 for the columns 8 a + b;
    its conjugate transpose over N; exp(-2 pi i k2 n2 / N2) as the [2 N2, 2 N2] that takes real and imaginary parts to
    such; its conjugate; and exp(-2 pi i (k1 + 1/4) b / N) as [2 N1, 8] float32.
    """
    points = rows * COLUMNS
    a, k, n, b = np.arange(COLUMNS // GROUP), np.arange(rows), np.arange(rows), np.arange(GROUP)
    turns = (4 * k[:, None] + 1) * (COLUMNS * n + GROUP * a[:, None, None])  # of 4 N, so without rounding
    one = _unit(turns, 4 * points)
    one = np.concatenate([one.real, one.imag], 1)
    two = _unit(np.outer(np.arange(COLUMNS), np.arange(COLUMNS)), COLUMNS)
    two = np.block([[two.real, -two.imag], [two.imag, two.real]])
    turn = _unit((4 * k[:, None] + 1) * b, 4 * points)
    split = (_split(x, parts) for x in (one, one.swapaxes(1, 2) / points, two, two.T))
    return *split, np.concatenate([turn.real, turn.imag], 0).astype(np.float32)


def _unit(turns, whole):
    return np.exp(-2j * np.pi * (turns % whole) / whole)


def _split(x, parts):
    """x as the sum of bfloat16 numbers, side by side."""
    found = []
    for _ in range(parts):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(np.float64)
    return np.ascontiguousarray(np.concatenate(found, -1))


def _rounded(x):
    """x (float32) to 8 significant bits, by its own bits: XLA may leave out a conversion there and back."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)


def product(table, x, parts, exact=False):
    """table [M K] of `parts` bfloat16 numbers times x [K N] float32, split alike; pairs below the last part are left
    out. exact: x holds bfloat16 numbers."""
    inner, total = x.shape[0], None
    for n in range(1 if exact else parts):
        part = x if exact or n == parts - 1 else _rounded(x)
        x = x - part
        part = part.astype(jnp.bfloat16)
        again = parts - n
        found = jax.lax.dot_general(
            table[:, : again * inner],
            jnp.concatenate([part] * again, 0),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total = found if total is None else total + found
    return total


def beside(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def lanes(x):
    """The pieces of 128 lanes."""
    return [x[:, n : n + LANES] for n in range(0, x.shape[1], LANES)]


def spread(turn, out, rows):
    """turn [2 N1, 8] to out [8, 2 N1, lanes], each number along all lanes."""
    for b in range(GROUP):
        out[b] = jnp.broadcast_to(turn[:, b : b + 1], (2 * rows, LANES))


def load(read, length, plane, rows):
    """The tokens of `read(slice)` to a plane [N1 N2, lanes] float32, zeros behind the last one."""
    whole, rest = divmod(length, COLUMNS)

    def copy(n, carry):
        at = pl.ds(pl.multiple_of(n * COLUMNS, COLUMNS), COLUMNS)
        plane[at] = read(at).astype(jnp.float32)
        return carry

    def clear(n, carry):
        plane[pl.ds(pl.multiple_of(n * COLUMNS, COLUMNS), COLUMNS)] = jnp.zeros((COLUMNS, LANES), jnp.float32)
        return carry

    if whole:
        jax.lax.fori_loop(0, whole, copy, 0)
    if whole < rows:
        jax.lax.fori_loop(whole, rows, clear, 0)
    if rest:
        at = pl.ds(whole * COLUMNS, rest)
        plane[at] = read(at).astype(jnp.float32)


def store(plane, length, write):
    """The plane's first tokens, given to `write(slice, tokens)`."""
    whole, rest = divmod(length, COLUMNS)

    def copy(n, carry):
        at = pl.ds(pl.multiple_of(n * COLUMNS, COLUMNS), COLUMNS)
        write(at, plane[at])
        return carry

    if whole:
        jax.lax.fori_loop(0, whole, copy, 0)
    if rest:
        at = pl.ds(whole * COLUMNS, rest)
        write(at, plane[at])


def first(planes, one, turn, plan, exact):
    """Over n1, in place: tokens in planes[0] to row k1 of the column n2, turned by exp(-2 pi i (k1 + 1/4) n2 / N)."""
    real, imaginary = planes
    rows = plan.rows

    def columns(n, carry):
        at = [pl.ds(n * TOGETHER + m, rows, stride=COLUMNS) for m in range(TOGETHER)]
        b = (n * TOGETHER) & (GROUP - 1)
        x = beside([real[s] for s in at])
        found = product(one[(n * TOGETHER) >> (GROUP.bit_length() - 1)], x, plan.parts, exact)
        for m, x in enumerate(lanes(found)):
            u, v = turn[b + m, :rows], turn[b + m, rows:]
            real[at[m]] = u * x[:rows] - v * x[rows:]
            imaginary[at[m]] = v * x[:rows] + u * x[rows:]
        return carry

    jax.lax.fori_loop(0, COLUMNS // TOGETHER, columns, 0)


def last(planes, back, turn, plan):
    """The inverse of `first`, the real part alone, in planes[0]."""
    real, imaginary = planes
    rows = plan.rows

    def columns(n, carry):
        at = [pl.ds(n * TOGETHER + m, rows, stride=COLUMNS) for m in range(TOGETHER)]
        b = (n * TOGETHER) & (GROUP - 1)
        x = []
        for m, s in enumerate(at):
            u, v = turn[b + m, :rows], turn[b + m, rows:]
            x.append(jnp.concatenate([u * real[s] + v * imaginary[s], u * imaginary[s] - v * real[s]], 0))
        found = product(back[(n * TOGETHER) >> (GROUP.bit_length() - 1)], beside(x), plan.parts)
        for m, x in enumerate(lanes(found)):
            real[at[m]] = x
        return carry

    jax.lax.fori_loop(0, COLUMNS // TOGETHER, columns, 0)


def second(planes, at, two, plan):
    """Over n2, of the rows `at`: [2 N2, lanes of each], real above imaginary."""
    x = beside([jnp.concatenate([planes[0][s], planes[1][s]], 0) for s in at])
    return product(two[...], x, plan.parts)


def put(planes, at, x):
    for s, piece in zip(at, lanes(x)):
        planes[0][s], planes[1][s] = piece[:COLUMNS], piece[COLUMNS:]


def get(planes, at):
    return beside([planes[0][s] for s in at]), beside([planes[1][s] for s in at])


def by_rows(plan, step):
    """step(slices of the planes) of a few rows after the other."""

    def turn(n, carry):
        step([pl.ds(pl.multiple_of((n * TOGETHER + m) * COLUMNS, COLUMNS), COLUMNS) for m in range(TOGETHER)])
        return carry

    jax.lax.fori_loop(0, plan.rows // TOGETHER, turn, 0)
