"""Attention against torch.nn.functional.scaled_dot_product_attention: K = V = 64, float32.

Forward and backward, or the forward pass alone where the name says so.
"""

import functools

from cases import Case, Side, gradients, jax_step


def inputs(batch, length, heads):
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, heads, 64)).astype(np.float32) for _ in range(4)]  # q, k, v, dy


def ours(batch, length, heads, *, forward_only=False, **options):
    import jax.numpy as jnp

    from kernels_pallas.attention import attention

    q, k, v, dy = map(jnp.asarray, inputs(batch, length, heads))
    run = functools.partial(attention, **options)
    return jax_step(run if forward_only else gradients(run, dy), q, k, v)


def sdpa(batch, length, heads, causal, forward_only=False):
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, dy = (torch.from_numpy(a).transpose(1, 2).contiguous() for a in inputs(batch, length, heads))
    if forward_only:
        with_no_gradient = torch.no_grad()(scaled_dot_product_attention)
        return lambda: [with_no_gradient(q, k, v, is_causal=causal).transpose(1, 2)], {}
    leaves = [a.requires_grad_() for a in (q, k, v)]

    def step():
        y = scaled_dot_product_attention(*leaves, is_causal=causal)
        return list(torch.autograd.grad(y, leaves, dy))

    return step, {}


def against_torch(name, batch, length, heads, causal, goal=">= 1.2", forward_only=False):
    return Case(
        name,
        {
            "archloom": Side(functools.partial(ours, batch, length, heads, causal=causal, forward_only=forward_only)),
            "sdpa": Side(functools.partial(sdpa, batch, length, heads, causal, forward_only), "torch"),
        },
        goal=goal,
    )


def against_full(length, window, goal, **options):
    sides = {"window": {"window": (window - 1, 0)}, "full": {}}
    return Case(
        f"B1 T{length} H8 causal, window {window}" + " forward" * bool(options),
        {
            name: Side(functools.partial(ours, 1, length, 8, causal=True, **each, **options))
            for name, each in sides.items()
        },
        goal=goal,
        tolerance=None,
    )


CASES = [
    against_torch("B8 T1000 H4 full", 8, 1000, 4, False, goal=""),
    against_torch("B1 T1024 H8 causal", 1, 1024, 8, True),
    against_torch("B1 T2048 H8 causal", 1, 2048, 8, True),
    against_torch("B1 T4096 H8 causal", 1, 4096, 8, True),
    *(
        against_torch(f"B1 T{length} H8 causal forward", 1, length, 8, True, forward_only=True)
        for length in (1024, 2048, 4096)
    ),
    against_full(8192, 128, ">= 8"),
    against_full(4096, 256, ">= 6"),
    against_full(4096, 256, ">= 6", forward_only=True),
]
