"""What every token mixer has, as a type: the contract that topologies rely on and the tests hold.

A mixer is a class registered in MIXERS whose constructor is (width, *, causal, ...options, rngs). It says of itself
  modes    which of "causal" and "bidirectional" the mathematics allows;
  axes     1 if it mixes a sequence (a grid is then flattened in row-major order), None if any number of grid axes;
  packing  the modes in which segment_ids keep packed sequences apart.
A causal mixer whose constructor takes `causal_chunk` gets one from builders whose tokens come in chunks of that length:
the tokens of a chunk then see each other and all former chunks. Its rows are whole chunks, and extend(x[B C D], state)
takes the place of step, C the chunk. A mixer that does not take it sees former tokens only.
A mixer whose output is a matrix times its values also has weights(x, keep=None) -> [B H T S], that matrix in float32,
for looking at, for distilling and for tests.
A mixer that can give its first tokens for less than all has read(x[B T D], count, keep=None) -> [B count D].
Padding (keep False) contributes nothing to other tokens; what a padding token itself gets is unspecified but finite.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int

from arch.errors import ConfigError, unknown, within
from arch.registry import MIXERS

State = dict[str, Any]  # a pytree of arrays with a leading batch axis, and scalars


class Mixer(Protocol):
    """A bidirectional or causal token mixer over x[B *A D]."""

    modes: tuple[str, ...]
    axes: int | None
    packing: tuple[str, ...]

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *A D"]:
        """The mixed tokens, same shape and dtype."""
        ...


class CausalMixer(Mixer, Protocol):
    """A causal mixer also extends a sequence token by token: step repeated gives what __call__ gives."""

    def init_state(self, batch: int, max_length: int) -> State:
        """The state before the first token. Of a size independent of max_length unless the class says otherwise."""
        ...

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]: ...


def head_width(width: int, num_heads: int, head_dim: int | None) -> int:
    """The option `head_dim` of a mixer with heads; None shares the model's width out among them."""
    if head_dim is None and width % num_heads:
        raise ConfigError("num_heads", f"{num_heads} does not divide width {width}; change one or give head_dim")
    return width // num_heads if head_dim is None else head_dim


def known_implementation(name: str | None, implementations: Collection[str]) -> str | None:
    """The option `implementation` of a mixer, checked against its op's table."""
    if name is not None and name not in implementations:
        raise unknown("implementation", name, implementations, "implementation")
    return name


def refuse_packing(segment_ids: Array | None, mixer: object) -> None:
    """For mixers whose mathematics runs over the whole row."""
    if segment_ids is not None:
        raise ConfigError(
            "segment_ids", f"{type(mixer).__name__} mixes whole rows; give each sequence a row of its own"
        )


def require_length(length: int, max_length: int, mixer: object) -> None:
    """For mixers with something of their own for every place of a row."""
    if length > max_length:
        raise ConfigError(
            "max_length",
            f"{type(mixer).__name__} was built for rows of {max_length}; got {length} tokens, build it longer",
        )


def build_inner(entry: Mapping[str, Any], *, causal: bool, **provided: Any) -> Any:
    """The mixer that a wrapper's option `mixer` names."""
    kind, mode = entry["kind"], "causal" if causal else "bidirectional"
    with within("mixer.kind"):
        if mode not in MIXERS[kind].modes:
            raise ConfigError("", f"{kind} has no {mode} form; choose another mixer")
    return MIXERS.build(entry, path="mixer", key="kind", causal=causal, **provided)
