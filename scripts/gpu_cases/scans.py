"""The selective scan, the linear recurrence, the long convolution and decoding, each against its nearest peer."""

from gpu_cases import Array, Case, Side


def scan(**options):
    from kernels_pallas.selective_scan import selective_scan

    return lambda *arrays: selective_scan(*arrays, **options)[0]


def scan_associative():
    """The states of all tokens at once, by jax.lax.associative_scan."""
    import jax
    import jax.numpy as jnp

    def run(u, delta, A, B, C):
        a = jnp.exp(delta[..., None].astype(jnp.float32) * A)
        b = (delta * u)[..., None].astype(jnp.float32) * B[:, :, None].astype(jnp.float32)
        _, h = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), axis=1)
        return jnp.einsum("btdn,btn->btd", h, C.astype(jnp.float32)).astype(u.dtype)

    return run


def scan_inputs(batch, length, width, states):
    flat, pairs = (batch, length, width), (batch, length, states)
    rates = Array((width, states), "decay", "float32")
    return [Array(flat), Array(flat, "uniform"), rates, Array(pairs), Array(pairs)]


def recurrence(**options):
    from kernels_pallas.linear_recurrence import linear_recurrence

    return lambda a, b: linear_recurrence(a, b, **options)[0]


def recurrence_associative():
    import jax

    def run(a, b):
        return jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), axis=1)[1]

    return run


def conv(**options):
    from kernels_pallas.long_conv import long_conv

    return lambda x, f: long_conv(x, f, **options)


def conv_torch():
    import torch

    def run(x, f):
        n = 2 * x.shape[1]
        x, f = x.float(), f.float()
        y = torch.fft.irfft(torch.fft.rfft(x, n, 1) * torch.fft.rfft(f, n, 0), n, 1)
        return y[:, : x.shape[1]].bfloat16()

    return run


def decode(**options):
    from kernels_pallas.decode_attention import decode_attention

    return lambda q, k, v, lengths: decode_attention(q, k, v, lengths, **options)


def decode_sdpa():
    from torch.nn.functional import scaled_dot_product_attention

    def run(q, k, v, lengths):  # all rows are full
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]

    return run


def decode_inputs(batch, length, heads, groups, width):
    cache = Array((batch, length, groups, width))
    return [Array((batch, heads, width)), cache, cache, Array((batch,), str(length), "int32")]


def scans(backward):
    size, states = 8 * 2048 * 2048, 16
    return Case(
        "selective scan 8x2048x2048x16" + " with gradient" * backward,
        scan_inputs(8, 2048, 2048, 16),
        scan_inputs(1, 32, 16, 4),
        {"archloom": Side(scan), "associative": Side(scan_associative)},
        backward=backward,
        flops=(27 if backward else 7) * size * states,
        bytes=(13 if backward else 6) * size,
        tolerance=5e-2,
    )


def recurrences(backward):
    size = 8 * 4096 * 2560
    return Case(
        "linear recurrence 8x4096x2560 fp32" + " with gradient" * backward,
        [Array((8, 4096, 2560), "uniform", "float32"), Array((8, 4096, 2560), dtype="float32")],
        [Array((1, 32, 16), "uniform", "float32"), Array((1, 32, 16), dtype="float32")],
        {"archloom": Side(recurrence), "associative": Side(recurrence_associative)},
        backward=backward,
        flops=(5 if backward else 2) * size,
        bytes=(32 if backward else 12) * size,
        tolerance=1e-3,
    )


CASES = [
    *(scans(backward) for backward in (False, True)),
    *(recurrences(backward) for backward in (False, True)),
    Case(
        "long convolution 16x4096x768",
        [Array((16, 4096, 768)), Array((4096, 768), dtype="float32")],
        [Array((1, 32, 16)), Array((32, 16), dtype="float32")],
        {"archloom": Side(conv), "torch.fft": Side(conv_torch, "torch")},
        bytes=4 * 16 * 4096 * 768,
    ),
    Case(
        "decode 8x131072, 32/8 heads, 128",
        decode_inputs(8, 131072, 32, 8, 128),
        decode_inputs(2, 64, 4, 2, 16),
        {"archloom": Side(decode), "sdpa": Side(decode_sdpa, "torch")},
        bytes=4 * 8 * 131072 * 8 * 128,
        goal="85 % of 4.3 TB/s",
    ),
]
