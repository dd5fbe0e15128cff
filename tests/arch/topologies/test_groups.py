"""Cutting tokens into groups and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from arch.topologies.groups import counts, cut, cut_keep, join


@pytest.mark.parametrize(
    ("axes", "size"),
    [((12,), (4,)), ((13,), (5,)), ((6, 8), (3, 2)), ((5, 7), (2, 3)), ((4, 5, 3), (2, 2, 2)), ((3,), (7,))],
)
def test_round_trip_and_places(axes, size):
    """join undoes cut, and the token at place p of group g is the one a loop over the groups finds there."""
    x = jnp.arange(2 * np.prod(axes) * 3).reshape(2, *axes, 3) + 1
    groups = cut(x, size)
    found = counts(axes, size)
    assert groups.shape == (2, np.prod(found), *size, 3)
    np.testing.assert_array_equal(join(groups, axes, size), x)
    for g, corner in enumerate(np.ndindex(*found)):
        for place in np.ndindex(*size):
            at = tuple(c * s + p for c, s, p in zip(corner, size, place))
            inside = all(i < n for i, n in zip(at, axes))
            want = x[(slice(None), *at)] if inside else jnp.zeros((2, 3), x.dtype)
            np.testing.assert_array_equal(groups[(slice(None), g, *place)], want)


def test_keep_is_there_only_where_it_must_be():
    assert cut_keep(None, 2, (12,), (4,)) is None
    filled = cut_keep(None, 2, (5, 4), (2, 2))
    assert filled.sum() == 2 * 5 * 4
    keep = jnp.arange(12)[None] < jnp.array([[5], [12]])
    np.testing.assert_array_equal(cut_keep(keep, 2, (12,), (4,)).reshape(2, 12), keep)
