"""What a task tells a model: the shape of its inputs and outputs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputSpec:
    """Token inputs of one task.

    vocab_size counts every id, padding (id 0) included; length is the longest input in tokens. With pair an example is
    two such inputs, to be told whether they belong together.
    """

    vocab_size: int
    num_classes: int
    length: int
    pair: bool = False

    dtype = "int32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's inputs."""
        return (2, self.length) if self.pair else (self.length,)


@dataclass(frozen=True)
class ImageSpec:
    """Image inputs of one task, float32 [height, width, channels], normalised by the task; every pixel is real."""

    height: int
    width: int
    channels: int
    num_classes: int

    dtype = "float32"
    pair = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's inputs."""
        return (self.height, self.width, self.channels)


Spec = InputSpec | ImageSpec
