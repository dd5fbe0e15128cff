"""Random streams that cost the same however long the program around them is."""

import jax
from flax import nnx
from jaxtyping import Array


class Stream(nnx.RngStream):
    """nnx.RngStream, key for key: the n-th is fold_in(key, n).

    nnx counts by `count[...] += 1`, which asks the traced counter for its sharding; to word the error that answers, jax
    walks through all that was traced so far, which makes building a model quadratic in its layers.
    """

    def __call__(self) -> Array:
        count = self.count.get_value()
        self.count.set_value(count + 1)
        return jax.random.fold_in(self.key[...], count)


def streams(**keys: Array | int) -> nnx.Rngs:
    """nnx.Rngs(**keys) of such streams."""
    rngs = nnx.Rngs()
    for tag, key in keys.items():
        setattr(rngs, tag, Stream(key, tag=tag))
    return rngs
