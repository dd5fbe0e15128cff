"""Token data sets on disk: written once as ArrayRecord through a TFDS builder, read back without TensorFlow.

A data set lives in ROOT/TASK/VARIANT/VERSION. TFDS writes beside it and renames, so a folder that exists is whole; a
file lock keeps processes that start together from making it twice. The content hash is stored with the data and
compared on every read, so a damaged file is an error and not a different experiment.
"""

import contextlib
import fcntl
import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from arch.errors import Mistake
from experiments.data.task import TokenExamples, content_hash

READ = 512  # examples a read


class DataError(Mistake):
    """Data that is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class DataSet:
    """What to keep and where: `pin` is the content hash it must have, None if nobody has pinned it."""

    root: Path
    task: str
    variant: str
    version: str
    num_classes: int
    pin: str | None = None

    @property
    def folder(self) -> Path:
        return self.root / self.task / self.variant / self.version

    def load(self, make: Callable[[], Mapping[str, TokenExamples]]) -> tuple[dict[str, TokenExamples], str]:
        """The splits and their content hash; `make` is called, by one process, if they are not on disk yet."""
        if not self.folder.exists():
            with locked(self.root / f".{self.task}-{self.variant}-{self.version}.lock"):
                if not self.folder.exists():
                    self._write(make)
        return self._read()

    def _write(self, make: Callable[[], Mapping[str, TokenExamples]]) -> None:
        for leftover in self.folder.parent.glob("*incomplete*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover)
        start = time.perf_counter()
        print(f"{self.task}: making {self.variant}, once", file=sys.stderr, flush=True)
        splits = make()
        made = content_hash(splits)
        self._check_pin(made)
        builder = self._builder(splits)
        builder.info.metadata.update(content_hash=made, splits=list(splits))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # TFDS's own bars
            builder.download_and_prepare()
        sizes = ", ".join(f"{name} {len(examples):,}" for name, examples in splits.items())
        seconds = time.perf_counter() - start
        print(f"{self.task}: made {sizes} in {seconds:.1f} s; kept in {self.folder}", file=sys.stderr, flush=True)

    def _read(self) -> tuple[dict[str, TokenExamples], str]:
        splits = {}
        try:
            builder = self._builder()
            stored = builder.info.metadata["content_hash"]
            for name in builder.info.metadata["splits"]:  # TFDS promises no order of its own
                source = builder.as_data_source(split=name)
                chunks = (range(i, min(i + READ, len(source))) for i in range(0, len(source), READ))
                records = (record for chunk in chunks for record in source.__getitems__(chunk))
                splits[name] = TokenExamples.pack((record["inputs"], record["label"]) for record in records)
        except Exception as error:  # whatever the decoder makes of damaged bytes
            raise DataError(f"{self.folder} cannot be read ({error}); delete it, and it is made again") from error
        found = content_hash(splits)
        if found != stored:
            raise DataError(
                f"{self.folder} is damaged: content {found[:12]}, not {stored[:12]}; delete it to make it again"
            )
        self._check_pin(found)
        return splits, found

    def _check_pin(self, found: str) -> None:
        if self.pin is not None and found != self.pin:
            raise DataError(
                f"{self.task} {self.variant}: content hash {found}, but {self.pin} is pinned; the generator no longer "
                f"makes the published data, or {self.folder} is from another version of it"
            )

    def _builder(self, splits: Mapping[str, TokenExamples] | None = None) -> Any:
        import tensorflow_datasets as tfds  # a quarter of a second, and only here

        num_classes, config = self.num_classes, tfds.core.BuilderConfig(name=self.variant, version=self.version)

        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
            name = self.task
            VERSION = tfds.core.Version(config.version)
            BUILDER_CONFIGS: ClassVar = [config]

            def _info(self) -> Any:
                tokens = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
                label = tfds.features.ClassLabel(num_classes=num_classes)
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict({"inputs": tokens, "label": label}),
                    metadata=tfds.core.MetadataDict(),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                return {name: self._generate_examples(examples) for name, examples in (splits or {}).items()}

            def _generate_examples(self, examples: TokenExamples) -> Iterator[tuple[int, Any]]:
                for i in range(len(examples)):
                    tokens, label = examples[i]
                    yield i, {"inputs": tokens, "label": label}

        return Builder(data_dir=str(self.root), config=self.variant, file_format="array_record")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file lock, which the system drops when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
