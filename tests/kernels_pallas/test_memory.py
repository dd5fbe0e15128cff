"""What a gradient takes beside its inputs and results on a CPU, by the compiler's plan: nothing runs."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import dispatch
from tests.kernels_pallas.op_cases import CASES

LENGTHS = (4096, 32_768, 131_072)


def planned(case, length):
    """(bytes of temporaries, bytes of the inputs, the cotangent among them) of the gradient: 8 heads of 64, float32."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in case.shapes(1, length, 8, 64)]
    dy = jax.eval_shape(case.function, *shapes)
    with dispatch.target("cpu"):
        gradient = jax.jit(lambda dy, *arrays: jax.vjp(case.function, *arrays)[1](dy))
        memory = gradient.lower(dy, *shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_temporaries_of_the_gradient_are_at_most_the_inputs_and_linear(name):
    found = {length: planned(CASES[name], length) for length in LENGTHS}
    for length, (temporary, inputs) in found.items():
        assert temporary <= inputs, (name, length, temporary / inputs)
    ratios = [temporary / inputs for temporary, inputs in found.values()]
    assert ratios[2] <= 1.1 * ratios[1] <= 1.21 * ratios[0], (name, ratios)  # linear, but for what does not grow
