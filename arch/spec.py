"""What a task tells a model: the shape of its inputs and outputs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputSpec:
    """Token inputs of one task.

    vocab_size counts every id, padding (id 0) included; length is the longest input in tokens.
    """

    vocab_size: int
    num_classes: int
    length: int
