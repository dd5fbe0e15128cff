"""The Fourier transform of the long convolution's TPU kernels: two matrix products, in place; README.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.long_conv.tiles import COLUMNS, GROUP, LANES, PITCH, TOGETHER


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
            precision=jax.lax.Precision.DEFAULT,  # whatever jax_default_matmul_precision says: the numbers are bfloat16
            preferred_element_type=jnp.float32,
        )
        total = found if total is None else total + found
    return total


def beside(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def halves(x):
    """Real and imaginary part."""
    return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


def lanes(x):
    """The pieces of 128 lanes."""
    return [x[:, n : n + LANES] for n in range(0, x.shape[1], LANES)]


def spread(turn, out, rows):
    """turn [2 N1, 8] to out [8, 2 N1, lanes], each number along all lanes."""
    for b in range(GROUP):
        out[b] = jnp.broadcast_to(turn[:, b : b + 1], (2 * rows, LANES))


def load(read, length, plane, rows):
    """The tokens of `read(slice)` to a plane [N1 PITCH, lanes] float32, zeros behind the last one."""
    whole, rest = divmod(length, COLUMNS)
    clear(plane, whole, rows)

    def copy(n):
        plane[pl.ds(n * PITCH, COLUMNS)] = read(_tokens(n)).astype(jnp.float32)

    _loop(whole, copy)
    if rest:
        plane[pl.ds(whole * PITCH, rest)] = read(pl.ds(whole * COLUMNS, rest)).astype(jnp.float32)


def store(plane, length, write):
    """The plane's first tokens, given to `write(slice, tokens)`."""
    whole, rest = divmod(length, COLUMNS)

    def copy(n):
        write(_tokens(n), plane[pl.ds(n * PITCH, COLUMNS)])

    _loop(whole, copy)
    if rest:
        write(pl.ds(whole * COLUMNS, rest), plane[pl.ds(whole * PITCH, rest)])


def clear(plane, first, rows):
    """Zeros in the rows from `first` on."""

    def row(n):
        plane[pl.ds((first + n) * PITCH, COLUMNS)] = jnp.zeros((COLUMNS, LANES), jnp.float32)

    _loop(rows - first, row)


def _tokens(n):
    return pl.ds(pl.multiple_of(n * COLUMNS, COLUMNS), COLUMNS)


def _loop(turns, step):
    def turn(n, carry):
        step(n)
        return carry

    if turns > 0:
        jax.lax.fori_loop(0, turns, turn, 0)


def first(planes, one, turn, plan, exact):
    """Over n1, in place: tokens in planes[0] to row k1 of the column n2, turned by exp(-2 pi i (k1 + 1/4) n2 / N)."""

    def columns(at, group, b):
        found = product(one[group], beside([planes[0][s] for s in at]), plan.parts, exact)
        turned = []
        for m, x in enumerate(lanes(found)):
            (u, v), (x, y) = halves(turn[b + m]), halves(x)
            turned.append((u * x - v * y, v * x + u * y))
        return turned

    _by_columns(plan, columns, planes)


def last(planes, back, turn, plan):
    """The inverse of `first`, the real part alone, in planes[0]."""
    real, imaginary = planes

    def columns(at, group, b):
        turned = []
        for m, s in enumerate(at):
            (u, v), x, y = halves(turn[b + m]), real[s], imaginary[s]
            turned.append(jnp.concatenate([u * x + v * y, u * y - v * x], 0))
        return [(x,) for x in lanes(product(back[group], beside(turned), plan.parts))]

    _by_columns(plan, columns, planes)


def _by_columns(plan, step, planes):
    """step(slices of a few columns, their group and their place in it) gives what the planes hold there after it."""

    def turn(n):
        found = []
        for m in range(plan.at_once):  # all are read before any is written: nothing waits
            column = (n * plan.at_once + m) * TOGETHER
            at = [pl.ds(column + i, plan.rows, stride=PITCH) for i in range(TOGETHER)]
            found.append((at, step(at, column >> (GROUP.bit_length() - 1), column & (GROUP - 1))))
        for at, columns in found:
            for s, parts in zip(at, columns):
                for plane, part in zip(planes, parts):
                    plane[s] = part

    _loop(COLUMNS // TOGETHER // plan.at_once, turn)


def second(planes, at, two, plan):
    """Over n2, of the rows `at`: [2 N2, lanes of each], real above imaginary."""
    return product(two[...], jnp.concatenate(get(planes, at), 0), plan.parts)


def get(planes, at):
    return tuple(beside([plane[s] for s in at]) for plane in planes)


def by_rows(plan, step, outputs, table=None):
    """step(slices of a few rows) gives what each pair of planes among `outputs` holds there after it, the first times
    the table, if there is one."""

    def turn(n):
        found = []
        for m in range(plan.at_once):
            row = (n * plan.at_once + m) * TOGETHER
            at = [pl.ds((row + i) * PITCH, COLUMNS) for i in range(TOGETHER)]
            x = step(at)
            found.append((at, x if isinstance(x, tuple) else (x,)))
        if table is not None:
            found = [(at, (product(table[...], x, plan.parts), *more)) for at, (x, *more) in found]
        for at, results in found:
            for planes, x in zip(outputs, results):
                for s, piece in zip(at, lanes(x)):
                    planes[0][s], planes[1][s] = halves(piece)

    _loop(plan.rows // TOGETHER // plan.at_once, turn)
