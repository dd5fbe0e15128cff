"""Tile sizes of the TPU kernels by device kind and shape, each with its measurement.

Bundles a token and head of the compiler's static schedule (libtpu 0.0.52) at bf16 2x4096x16x128, 512 tokens a grid
step, from results/kernels/tune.jsonl: chunk / heads a grid step.

                      v5e                                        v6e
    plain forward     128/2 1.51  128/4 1.32  256/2 1.97  256/4 1.79     128/2 1.55  128/4 1.35  256/2 1.29  256/4 1.05
    plain backward    128/2 3.26  128/4 3.19  256/2 4.21  256/4 4.03     128/2 2.95  128/4 2.64  256/2 2.73  256/4 2.44
    head forward      128/2 2.49  128/4 2.35  256/2 3.72  256/4 3.50     128/2 2.26  128/4 2.12  256/2 2.13  256/4 1.98
    head backward     128/2 4.53  128/4 4.44  256/2 7.37  256/4 7.16     128/2 5.08  128/4 4.89  256/2 4.91  256/4 4.43
    channel forward   128/2 4.29  128/4 4.18  256/2 5.23  256/4 4.94     128/2 4.12  128/4 3.95  256/2 4.03  256/4 3.75
    channel backward  128/2 13.9  128/4 13.6  256/2 21.5  256/4 21.0     128/2 13.8  128/4 13.6  256/2 16.8  256/4 16.4

More heads hide the latency of one by the work of another; every one adds to the program, so a decay a channel, whose
program is the longest, takes fewer: the last percent is not worth twice the time to compile.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels_pallas import mosaic_tpu

CHUNK = 128  # the width of the matrix unit up to v5p
WIDE = ("TPU v6", "TPU7x")  # the matrix unit is 256 wide
STEP = 512  # tokens a grid step, and so between two saved states: an eighth of q, k and v in bfloat16
HEADS = 4  # a grid step, at most
LANES = 512  # columns of all the heads of a grid step, at most
VMEM = 32 << 20  # bytes a kernel may use, of which the compiler takes some for the registers it runs out of
WORKING = 8 << 20


class Plan(NamedTuple):
    """What a kernel is built from, all static."""

    chunk: int
    chunks: int  # a grid step
    heads: int  # a grid step of the forward pass
    heads_backward: int
    key_width: int  # of one head, filled up
    value_width: int
    decay: str | None  # None, "head" or "channel"
    interpret: mosaic_tpu.Interpret
    normalize: bool = False  # divide by z_t . q_t; with no decay or one a head


def choose(
    shape: tuple[int, ...],
    values: int,
    dtype: Any,
    decay: str | None,
    device: str | None,
    *,
    chunk: int | None = None,
    step: int | None = None,
    heads: int | None = None,
    normalize: bool = False,
    interpret: mosaic_tpu.Interpret = False,
) -> Plan:
    """The plan for q of shape [B T H K] and values of that width on a device; what is None is chosen."""
    _, length, count, keys = shape
    key_width, value_width = width(keys, count), width(values, count)
    exact = jnp.dtype(dtype) == jnp.float32
    if chunk is None:
        chunk = 2 * CHUNK if decay != "channel" and not exact and (device or "").startswith(WIDE) else CHUNK
    chunk = min(chunk, max(16, 1 << (length - 1).bit_length()))
    if step is None:
        step = STEP // 2 if exact and decay == "channel" else STEP
    chunks = max(1, min(step, length + chunk - 1) // chunk)
    lanes = LANES // 2 if exact or decay == "channel" else LANES
    most = min(HEADS, lanes // max(key_width, value_width))
    fewer = most // 2 if exact or decay == "channel" else most  # long programs, slow to compile
    forward, backward = (heads_together(count, key_width, value_width, heads or n) for n in (most, fewer))
    return Plan(chunk, chunks, forward, backward, key_width, value_width, decay, interpret, normalize)


def width(size: int, heads: int) -> int:
    """A head's width as the kernels take it: a multiple of 128 lanes, or 64 where two heads fill them."""
    return size if size % 128 == 0 or (size == 64 and heads % 2 == 0) else -(-size // 128) * 128


def heads_together(heads: int, key_width: int, value_width: int, most: int) -> int:
    """The largest divisor of `heads` up to `most` whose columns are whole lane tiles, else the smallest."""
    fit = [n for n in range(1, heads + 1) if heads % n == 0 and n * key_width % 128 == 0 and n * value_width % 128 == 0]
    return max([n for n in fit if n <= most] or fit[:1])
