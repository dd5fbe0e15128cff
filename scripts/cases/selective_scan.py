"""The selective scan against lax.associative_scan over [B T D N] and transformers' loop over T: float32.

N = 16 states a channel, as in Mamba. The loop is that of the library's Mamba without its CUDA kernels, forward and
backward. Its backward pass takes time quadratic in T, since every token's slice has a gradient of the full size;
the forward passes are therefore compared too, and both passes only at T 512.
"""

import functools
import inspect
import sys

from cases import Case, Side, gradients, jax_step

STATES = 16


def inputs(batch, length, width):
    """u, steps log-uniform in [0.001, 0.1] and rates -1 ... -N as Mamba's first ones, B, C, D, dy."""
    import numpy as np

    rng = np.random.default_rng(0)
    u, dy = (rng.normal(size=(batch, length, width)) for _ in range(2))
    delta = 10 ** rng.uniform(-3, -1, size=u.shape)
    A = -np.tile(np.arange(1, STATES + 1), (width, 1))
    B, C = (rng.normal(size=(batch, length, STATES)) for _ in range(2))
    return [x.astype(np.float32) for x in (u, delta, A, B, C, np.ones(width))], dy.astype(np.float32)


def jax_side(function, sizes, forward_only):
    import jax.numpy as jnp

    arguments, dy = inputs(*sizes)
    run = function if forward_only else gradients(function, jnp.asarray(dy))
    return jax_step(run, *map(jnp.asarray, arguments))


def ours(*sizes, forward_only=False):
    from kernels_pallas.selective_scan import selective_scan

    return jax_side(lambda *a: selective_scan(*a)[0], sizes, forward_only)


def associative_scan(*sizes):
    import jax
    import jax.numpy as jnp

    def join(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    def run(u, delta, A, B, C, D):
        decay, added = jnp.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
        h = jax.lax.associative_scan(join, (decay, added), axis=1)[1]
        return jnp.einsum("btdn,btn->btd", h, C) + D * u

    return jax_side(run, sizes, False)


def transformers_loop(*sizes, forward_only=False):
    import torch

    sys.modules["torchvision"] = None  # type: ignore[assignment]  # one that does not fit torch breaks the imports
    from transformers.models.mamba import modeling_mamba

    scan = inspect.unwrap(modeling_mamba.mamba_selective_scan)
    arguments, dy = inputs(*sizes)
    tokens_last = [torch.from_numpy(x) if x.ndim < 3 else torch.from_numpy(x).mT.contiguous() for x in arguments]
    dy = torch.from_numpy(dy).mT.contiguous()

    def forward():
        with torch.no_grad():
            return [scan(*tokens_last)]

    def both():
        leaves = [x.detach().requires_grad_() for x in tokens_last]
        return list(torch.autograd.grad(scan(*leaves), leaves, dy))

    return forward if forward_only else both, {}


def scan_of_tokens(*sizes, forward_only=False):
    """lax.scan over T, the state of one token at a time; what jax keeps for the backward pass is all states."""
    import jax
    import jax.numpy as jnp

    def run(u, delta, A, B, C, D):
        def token(h, given):
            u, delta, B, C = given
            h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
            return h, (h * C[:, None]).sum(-1)

        start = jnp.zeros((u.shape[0], *A.shape))
        y = jax.lax.scan(token, start, [x.swapaxes(0, 1) for x in (u, delta, B, C)])[1]
        return y.swapaxes(0, 1) + D * u

    return jax_side(run, sizes, forward_only)


def torch_loop(*sizes, forward_only=False):
    """One token after the other, as one writes it in eager PyTorch."""
    import torch

    arguments, dy = inputs(*sizes)
    arguments, dy = [torch.from_numpy(x) for x in arguments], torch.from_numpy(dy)

    def scan(u, delta, A, B, C, D):
        h, y = torch.zeros(u.shape[0], *A.shape), []
        for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C))):
            h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
            y.append((h * C_t[:, None]).sum(-1))
        return torch.stack(y, 1) + D * u

    def forward():
        with torch.no_grad():
            return [scan(*arguments)]

    def both():
        leaves = [x.detach().requires_grad_() for x in arguments]
        return list(torch.autograd.grad(scan(*leaves), leaves, dy))

    return forward if forward_only else both, {}


def against_loops(name, *sizes, goals=("", ""), **options):
    """Two cases: against eager PyTorch and against lax.scan."""
    mine = Side(functools.partial(ours, *sizes, **options))
    torch_side = Side(functools.partial(torch_loop, *sizes, **options), "torch")
    scan_side = Side(functools.partial(scan_of_tokens, *sizes, **options))
    return [
        Case(f"{name}, torch", {"archloom": mine, "torch_loop": torch_side}, goal=goals[0]),
        Case(f"{name}, lax.scan", {"archloom": mine, "lax.scan": scan_side}, goal=goals[1]),
    ]


def against_associative_scan(name, *sizes):
    sides = {
        "archloom": Side(functools.partial(ours, *sizes)),
        "associative_scan": Side(functools.partial(associative_scan, *sizes)),
    }
    return Case(name, sides, goal=">= 1.5 and a quarter of the memory")


def against_transformers(name, *sizes, **options):
    sides = {
        "archloom": Side(functools.partial(ours, *sizes, **options)),
        "transformers": Side(functools.partial(transformers_loop, *sizes, **options), "torch"),
    }
    return Case(name, sides, goal=">= 5")


CASES = [
    *against_loops("B2 T1024 D256", 2, 1024, 256, goals=(">= 8", "")),
    *against_loops("B2 T1024 D256 forward", 2, 1024, 256, goals=("", ">= 1"), forward_only=True),
    against_associative_scan("B1 T4096 D256", 1, 4096, 256),
    against_associative_scan("B1 T4096 D512", 1, 4096, 512),
    against_transformers("B1 T512 D256", 1, 512, 256),
    against_transformers("B1 T4096 D256 forward", 1, 4096, 256, forward_only=True),
]
