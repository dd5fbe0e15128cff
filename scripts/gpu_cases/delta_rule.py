"""The gated delta rule against flash-linear-attention (Triton), bf16, 16 key and 32 value heads of 128."""

import functools

from gpu_cases import Array, Case, Side


def ours(**options):
    import jax.numpy as jnp

    from kernels_pallas.delta_rule import delta_rule

    def run(q, k, v, beta, g):
        repeat = v.shape[2] // q.shape[2]  # the copies are counted against us
        q, k = (jnp.repeat(x, repeat, axis=2) if repeat > 1 else x for x in (q, k))
        return delta_rule(q, k, v, beta, g, **options)[0]

    return run


def fla():
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]


def inputs(length, keys, values, width):
    q, gate = (1, length, keys, width), (1, length, values)
    v = Array((1, length, values, width))
    return [Array(q, "unit"), Array(q, "unit"), v, Array(gate, "uniform", "float32"), Array(gate, "decay", "float32")]


def case(length, keys, values, backward, name="", goal=">= 1", **options):
    chunk, width = 64, 128
    per = 2 * chunk * 5 * width + 6 * width * width + 4 * chunk * chunk
    return Case(
        f"{name}1x{length}x{keys}/{values}x128" + " with gradient" * backward,
        inputs(length, keys, values, width),
        inputs(64, 1, 2, 16),
        {"archloom": Side(functools.partial(ours, **options)), "fla": Side(fla, "torch", cpu=False)},
        backward=backward,
        flops=length * values * per * (3.5 if backward else 1),
        bytes=length * 2 * width * (2 * keys + 2 * values) * (3 if backward else 1),
        goal=goal,
    )


CASES = [case(length, 16, 32, backward) for length in (8192, 32768) for backward in (False, True)]
CASES += [case(32768, 16, 32, b, "XLA alone ", ">= 0.33", implementation="chunked") for b in (False, True)]
