"""Streams give nnx's keys, without asking a traced value what it does not know."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arch.rng import streams


def draws(rngs):
    """Keys of both streams, in turn, of a copy made on the way, and what is dropped with them."""
    keys = [rngs.params(), rngs.dropout(), rngs.params()]
    dropout = nnx.Dropout(0.5, rngs=rngs)
    return jnp.stack([jax.random.key_data(key) for key in (*keys, rngs.dropout.fork()(), rngs.dropout())]), [
        dropout(jnp.ones(50)) for _ in range(2)
    ]


def test_keys_are_those_of_nnx():
    expected, found = (draws(make(params=3, dropout=jax.random.key(4))) for make in (nnx.Rngs, streams))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    traced = jax.jit(lambda key: draws(streams(params=3, dropout=key)))(jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, traced, expected)


def test_counting_asks_for_no_sharding(monkeypatch):
    """Where nnx does, jax walks through the whole program so far to word its error."""
    asked = []

    def sharding(self):
        asked.append(self)
        raise AttributeError("sharding")

    monkeypatch.setattr(jax.core.Tracer, "sharding", property(sharding))
    counts = []
    for make in (streams, nnx.Rngs):
        jax.eval_shape(lambda make=make: draws(make(params=3, dropout=4)))
        counts.append(len(asked))
    assert counts[0] == 0 < counts[1]
