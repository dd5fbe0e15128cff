"""At which precision the ops multiply float32: exactly, unless the program asks for less.

The default of XLA rounds the operands of a float32 product to 10 bits on NVIDIA (TF32) and to 8 on a TPU, and an op
promises 1e-5. So the forms that XLA compiles state the highest precision where inputs are float32. What is rounded
to 16 bits before it comes is multiplied at the default, and sums of log decays are float32 whatever the inputs.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST  # of sums of log decays, always: an error there is one in the exponent


@contextmanager
def exact(*arrays: Any) -> Iterator[None]:
    """Products traced within are of the highest precision if any of `arrays`, an op's factors, is float32.

    Where jax.default_matmul_precision is set, by whoever calls the op, that stays. A backward pass is traced outside of
    its forward pass's context and needs one of its own; the transposes that jax makes of a product take over its own.
    """
    wide = any(x is not None and jnp.dtype(x.dtype).itemsize >= 4 for x in arrays)
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # made when jax is imported
    if wide and asked is None:
        with jax.default_matmul_precision("highest"):
            yield
    else:
        yield


def exact_for(factors: Callable[..., tuple[Any, ...]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function runs within `exact` of factors(*its arguments). Goes below jax.jit."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with exact(*factors(*args)):
                return function(*args, **kwargs)

        return run

    return decorate
