"""Softmax attention: our choice against torch's scaled_dot_product_attention and jax's cuDNN, bf16, causal.

Twelve shapes, widths 64 to 256; windows and block masks against full attention.
"""

import functools

from gpu_cases import Array, Case, Side


def ours(*, window=None, **options):
    from kernels_pallas.attention import attention

    window = None if window is None else (window - 1, 0)
    return functools.partial(attention, causal=True, window=window, **options)


def cudnn(*, window=None):
    import jax

    local = None if window is None else (window - 1, 0)
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def sdpa():
    from torch.nn.functional import scaled_dot_product_attention

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(
            1, 2
        )

    return run


def inputs(batch, length, heads, groups, width):
    return [Array((batch, length, n, width)) for n in (heads, groups, groups)]


def case(batch, length, heads, groups, width, backward):
    scores = length * (length + 1) / 2
    products = 2 * batch * heads * scores * width
    return Case(
        f"{batch}x{length}x{heads}/{groups}x{width} causal" + " with gradient" * backward,
        inputs(batch, length, heads, groups, width),
        inputs(1, 64, 2, 1, 16),
        {"archloom": Side(ours), "sdpa": Side(sdpa, "torch"), "cudnn": Side(cudnn, cpu=False)},
        backward=backward,
        flops=products * (2 + 5 * backward),
        bytes=2 * batch * length * width * (2 * heads + 2 * groups) * (1 + 2 * backward),
        goal=">= 0.97",
    )


def windowed(length, window):
    sides = {
        "window": Side(functools.partial(ours, window=window)),
        "cudnn window": Side(functools.partial(cudnn, window=window), cpu=False),
    }
    shapes = inputs(1, length, 16, 16, 128)
    flops = 4 * 16 * length * window * 128
    return Case(f"1x{length}x16x128 window {window}", shapes, inputs(1, 64, 2, 1, 16), sides, flops=flops)


SHAPES = [(4, 4096, 16, 16, 128), (1, 16384, 16, 16, 128), (4, 4096, 32, 32, 64), (4, 4096, 8, 8, 256)]
SHAPES += [(16, 1024, 16, 16, 128), (4, 4096, 32, 8, 128)]
CASES = [case(*shape, backward) for shape in SHAPES for backward in (False, True)]
CASES += [windowed(16384, 512), windowed(32768, 1024)]
