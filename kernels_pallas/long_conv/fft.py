"""Fourier form, over any number of axes: product of spectra; runs everywhere. 1-D causal is its simplest case."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch

GROUP = 1 << 18  # numbers of x in a group of channels on a CPU: all channels at once took 1.5 to 2 times as long


def long_conv_fft(x: Float[Array, "B T D"], filter: Float[Array, "S D"]) -> Float[Array, "B T D"]:
    """y (float32) of api.long_conv.

    On a CPU GROUP channels after the other, whose transforms stay in cache. Saved for the backward pass: the inputs;
    the spectra are made again.
    """
    looped = dispatch.platform() == "cpu"
    group = _divisor(x.shape[-1], max(1, GROUP // (x.shape[0] * x.shape[1]))) if looped else x.shape[-1]
    return _by_groups(group, x, filter)


def _divisor(number, most):
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _by_groups(group, x, filter):
    def some(n, y):
        return _put(y, fft_convolve(_channels(x, n, group), _channels(filter, n, group), (0,)), n)

    return _loop(x.shape[-1] // group, some, jnp.zeros(x.shape, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _groups_backward(group, saved, dy):
    x, filter = saved

    def some(n, grads):
        given = _channels(x, n, group), _channels(filter, n, group)
        parts = jax.vjp(lambda x, filter: fft_convolve(x, filter, (0,)), *given)[1](_channels(dy, n, group))
        return tuple(_put(grad, part, n) for grad, part in zip(grads, parts))

    return _loop(x.shape[-1] // group, some, (jnp.zeros_like(x), jnp.zeros_like(filter)))


_by_groups.defvjp(lambda group, *saved: (_by_groups(group, *saved), saved), _groups_backward)


def _loop(count, step, carry):
    return step(0, carry) if count == 1 else jax.lax.fori_loop(0, count, step, carry)


def _channels(x, n, group):
    return jax.lax.dynamic_slice_in_dim(x, n * group, group, x.ndim - 1)


def _put(x, part, n):
    return jax.lax.dynamic_update_slice_in_dim(x, part, n * part.shape[-1], x.ndim - 1)


def fft_convolve(
    x: Float[Array, "B *A D"], filter: Float[Array, "*S D"], first: tuple[int, ...]
) -> Float[Array, "B *A D"]:
    """y_t = sum_s filter_s x_{t - s - first} (float32), t, s and first vectors over the axes A; outside A x is 0.

    `first` is the lag of the first tap along each axis: 0 is causal, -(S - 1) / 2 centred. Saved for the backward pass:
    the spectra of x and of the filter, which it needs again.
    """
    x, filter = (jnp.moveaxis(a.astype(jnp.float32), -1, -a.ndim + i) for a, i in ((x, 1), (filter, 0)))
    y = _convolve(x, filter, first, filter.shape[1:])  # [B D *A] inside: a transform runs over adjacent numbers
    return jnp.moveaxis(y, 1, -1)


@functools.lru_cache
def fast_size(least: int) -> int:
    """The smallest even 2^a 3^b 5^c >= least, a length that Fourier transforms like."""
    size = max(2, least + least % 2)
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2


def _sizes(lengths, taps, first):
    """Long enough that what wraps around falls outside the outputs."""
    return tuple(fast_size(max(a + s - 1 + f, a - f, a, s)) for a, s, f in zip(lengths, taps, first))


def _spectrum(x, sizes):
    """[... *A] -> [... *K], zeros appended along each axis up to its size."""
    pad = [(0, 0)] * (x.ndim - len(sizes)) + [(0, n - a) for n, a in zip(sizes, x.shape[-len(sizes) :])]
    x = _transform(jnp.pad(x, pad), "RFFT", sizes)
    for axis in range(-len(sizes), -3):  # one call takes at most three axes
        x = jnp.fft.fft(x, axis=axis)
    return x


def _inverse(spectrum, sizes):
    for axis in range(-len(sizes), -3):
        spectrum = jnp.fft.ifft(spectrum, axis=axis)
    return _transform(spectrum, "IRFFT", sizes)


def _transform(x, kind, sizes):
    """Over the last axes, at most three. All before them become one: XLA's CPU transforms fail on other layouts of
    memory than the plain one, which sharded channels lead to."""
    axes = sizes[-3:]
    front, points = x.shape[: -len(axes)], x.shape[-len(axes) :]
    x = jax.lax.fft(x.reshape(-1, *points), kind, axes)
    return x.reshape(*front, *x.shape[1:])


def _window(x, start, lengths):
    """Places start, ..., start + lengths - 1 of the last axes."""
    return x[(..., *(slice(s, s + n) for s, n in zip(start, lengths)))]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, filter, first, taps):
    return _forward(x, filter, first, taps)[0]


def _forward(x, filter, first, taps):  # [B D *A], [D *S]
    lengths = x.shape[2:]
    sizes = _sizes(lengths, taps, first)
    X, F = _spectrum(x, sizes), _spectrum(filter, sizes)
    return _window(_inverse(X * F, sizes), tuple(-f for f in first), lengths), (X, F)


def _backward(first, taps, saved, dy):
    X, F = saved
    lengths = dy.shape[2:]
    sizes = _sizes(lengths, taps, first)
    dY = _spectrum(jnp.pad(dy, [(0, 0), (0, 0)] + [(-f, 0) for f in first]), sizes)
    start = (0,) * len(sizes)
    dx = _window(_inverse(dY * F.conj(), sizes), start, lengths)
    dfilter = _window(_inverse((dY * X.conj()).sum(0), sizes), start, taps)
    return dx, dfilter


_convolve.defvjp(_forward, _backward)
