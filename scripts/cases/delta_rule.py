"""The delta rule, chunkwise against token by token: float32, forward and backward."""

import functools

from cases import Case, Side, gradients, jax_step


def inputs(length, decay, batch=1, heads=4, width=64):
    """q, keys of length 1, v, beta in [0, 1], a decay of about exp(-0.1) a token (or none), and dy."""
    import numpy as np

    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.normal(size=(batch, length, heads, width)) for _ in range(4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gates = [rng.random((batch, length, heads))]
    if decay:
        gates.append(-0.1 * rng.exponential(size=(batch, length, heads)))
    return [x.astype(np.float32) for x in (q, k, v, *gates)], dy.astype(np.float32)


def side(implementation, *sizes):
    import jax.numpy as jnp

    from kernels_pallas.delta_rule import delta_rule

    arguments, dy = inputs(*sizes)
    run = gradients(functools.partial(delta_rule, implementation=implementation), jnp.asarray(dy))
    return jax_step(run, *map(jnp.asarray, arguments))


def chunked_against_ref(length, decay, width, goal):
    name = f"B1 T{length} H4 K{width}" + " decay" * decay
    names = ("chunked", "ref")
    return Case(
        name, {each: Side(functools.partial(side, each, length, decay, 1, 4, width)) for each in names}, goal=goal
    )


CASES = [
    *(chunked_against_ref(length, False, 128, ">= 10") for length in (512, 2048, 8192)),
    *(chunked_against_ref(4096, decay, 64, ">= 8") for decay in (False, True)),
]
