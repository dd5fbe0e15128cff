"""Heads: one axis of width n x H x K to n arrays [B T H K], and back."""

from jaxtyping import Array, Float


def split_heads(x: Float[Array, "B T D"], *, sizes: tuple[int, ...], head_dim: int) -> list[Float[Array, "B T H K"]]:
    """Cuts D = sum(sizes) x head_dim into arrays of sizes[i] heads each."""
    x = x.reshape(*x.shape[:2], sum(sizes), head_dim)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x[:, :, start : start + size] for start, size in zip(starts, sizes)]


def join_heads(x: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
