"""Linear attention, retention and GLA against flash-linear-attention (Triton), bf16, head 128."""

import functools

from gpu_cases import Array, Case, Side


def ours(**options):
    from kernels_pallas.linear_attention import linear_attention

    return lambda *arrays: linear_attention(*arrays, **options)[0]


def chunked(**options):
    """The XLA form with its tiles given."""
    import jax.numpy as jnp

    from kernels_pallas.linear_attention.chunked import linear_attention_chunked

    def run(q, k, v, g):
        batch, _, heads, width = q.shape
        state = jnp.zeros((batch, heads, width, v.shape[-1]), jnp.float32)
        return linear_attention_chunked(q, k, v, g, state, **options)[0].astype(v.dtype)

    return run


def retention(**options):
    """RetNet's decays, one a head, as flash-linear-attention has them."""
    import jax.numpy as jnp

    run = ours(**options)

    def retain(q, k, v):
        decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(q.shape[2], dtype=jnp.float32))))
        return run(q, k, v, jnp.broadcast_to(decay, q.shape[:3]))

    return retain


def fla_retention():
    from fla.ops.retention import chunk_retention

    return lambda q, k, v: chunk_retention(q, k, v, scale=1.0)[0]


def fla_simple_gla():
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, g: chunk_simple_gla(q, k, v, g, scale=1.0)[0]


def fla_gla():
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)[0]


def inputs(shape, gate=None):
    gates = {None: [], "head": [Array(shape[:3], "decay", "float32")], "channel": [Array(shape, "decay", "float32")]}
    return [Array(shape, "unit"), Array(shape, "unit"), Array(shape), *gates[gate]]


def case(name, shape, ours, theirs, gate=None, backward=False, goal="", tune=None):
    tokens, width = shape[0] * shape[1] * shape[2], shape[3]
    chunk = 128
    flops = tokens * (4 * chunk * width + 4 * width * width) * (3.25 if backward else 1)
    gates = {None: 0, "head": 1, "channel": width}[gate]
    moved = tokens * (8 * width * (3 if backward else 1) + 4 * gates)
    sides = {"archloom": Side(ours), **{key: Side(make, "torch", cpu=False) for key, make in theirs.items()}}
    return Case(
        f"{name} {'x'.join(map(str, shape))}" + " with gradient" * backward,
        inputs(shape, gate),
        inputs((1, 64, 2, 16), gate),
        sides,
        backward=backward,
        flops=flops,
        bytes=moved,
        goal=goal,
        tune=tune or {},
    )


LONG, SHORT = (2, 16384, 16, 128), (4, 4096, 16, 128)
GATES = ("head", "channel")
CASES = [
    *(
        case("retention", LONG, retention, {"fla": fla_retention}, backward=b, goal=">= 1 (0.42 ms)")
        for b in (False, True)
    ),
    *(case("decay a head", LONG, ours, {"fla": fla_simple_gla}, "head", b) for b in (False, True)),
    *(case("decay a channel", SHORT, ours, {"fla": fla_gla}, "channel", b) for b in (False, True)),
    case("retention, XLA alone", LONG, functools.partial(retention, implementation="chunked"), {"fla": fla_retention}),
    *(case(f"chunks, decay a {g}", SHORT, chunked, {}, g, True, tune={"chunk": (64, 128, 256)}) for g in GATES),
]
