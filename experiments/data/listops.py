"""ListOps: the value, 0 to 9, of a nested expression of MIN, MAX, MED and SM. Long Range Arena's first task.

Source: Nangia & Bowman 2018, arXiv:1804.06028; Tay et al. 2020, arXiv:2011.04006. The defaults are LRA's set in size
and distribution (experiments/data/listops_generator.py says exactly how it is drawn); the examples are our own, made
from data_seed, or LRA's own files with tsv_dir.

Chance is 10 %, but the majority class has about 17 % (classes 0 and 9): print `majority` beside every accuracy.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import NonNegative, Positive
from arch.spec import InputSpec
from experiments.data import listops_tsv
from experiments.data.listops_generator import TOKENS, Limits, generate
from experiments.data.store import DataSet
from experiments.data.task import Padded, TokenExamples, content_hash, data_root

VERSION = "1.0.0"  # of the generated examples: raise it when the generator's stream changes, and pin anew

# Variant: content hash. `python -m experiments.data listops --OPTION ...` prints both.
PINNED: dict[str, str] = {
    "length_500_2000-depth_10-args_10-n_96000_2000_2000-seed_0": (
        "9b84274c9de16aec11b484e23d310a43c4a2555dd6cf14d10b3dc667665f4101"
    ),
    "length_32_128-depth_10-args_10-n_20000_2000_2000-seed_0": (
        "a2f18b396421e4649bd1ef31bbe6c087c2457ef2a8edde90a51827cee80b0681"
    ),
}


@TASKS.register("listops")
class ListOps:
    """Token ids: 0 padding, 1-10 the digits 0-9, 11-14 [MIN [MAX [MED [SM, 15 the closing X. All is held in memory."""

    metric = "accuracy"
    chance = 0.1
    token_labels = False

    def __init__(
        self,
        *,
        max_length: Positive = 2000,  # tokens < max_length, as LRA counts them; inputs are padded to it
        min_length: NonNegative | None = None,  # tokens > min_length; None is a quarter of max_length, LRA's 500
        max_depth: Positive = 10,
        max_args: Positive = 10,
        train_examples: Positive = 96_000,
        validation_examples: Positive = 2_000,
        test_examples: Positive = 2_000,
        data_seed: NonNegative = 0,  # the examples; the order of training is the run's seed
        data_dir: str | None = None,  # None: $ARCHLOOM_DATA, else ~/.cache/archloom/data
        tsv_dir: str | None = None,  # read LRA's basic_*.tsv from here; sizes, lengths and seed are then the files'
    ):
        if max_depth < 2:
            raise ConfigError("max_depth", "at 1 every tree is one digit; use 2 or more")
        if max_args < 2:
            raise ConfigError("max_args", "an operator takes 2 arguments or more; use 2 or more")
        if data_seed >= 2**64:
            raise ConfigError("data_seed", "does not fit in 64 bits; use a smaller one")
        self.limits = Limits(max_length // 4 if min_length is None else min_length, max_length, max_depth, max_args)
        if self.limits.max_length - self.limits.min_length < 2:
            raise ConfigError(
                "min_length",
                f"no length is strictly between {self.limits.min_length} and {max_length}; lower it, or leave it None",
            )
        self.data_seed, self.data_dir, self.tsv_dir = data_seed, data_dir, tsv_dir
        self.spec = InputSpec(vocab_size=len(TOKENS), num_classes=10, length=max_length)
        self._sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self._examples: dict[str, TokenExamples] = {}
        self._hash = ""

    @property
    def variant(self) -> str:
        """Everything that decides the generated examples, as a folder name."""
        x, sizes = self.limits, "_".join(map(str, self._sizes.values()))
        trees = f"length_{x.min_length}_{x.max_length}-depth_{x.max_depth}-args_{x.max_args}"
        return f"{trees}-n_{sizes}-seed_{self.data_seed}"

    @property
    def splits(self) -> Mapping[str, int]:
        if self.tsv_dir is None:
            return self._sizes
        self.prepare()
        return {name: len(examples) for name, examples in self._examples.items()}

    @property
    def content_hash(self) -> str:
        self.prepare()
        return self._hash

    def prepare(self) -> None:
        """Reads the examples into memory, from disk if they are there and else from the generator; checks the hash."""
        if self._examples:
            return
        if self.tsv_dir is not None:
            self._examples = listops_tsv.read(Path(self.tsv_dir).expanduser(), self.limits.max_length)
            self._hash = content_hash(self._examples)
        else:
            data = DataSet(
                data_root(self.data_dir),
                "listops",
                self.variant,
                VERSION,
                self.spec.num_classes,
                PINNED.get(self.variant),
            )
            self._examples, self._hash = data.load(self._generate)

    def _generate(self) -> dict[str, TokenExamples]:
        """The stream's first distinct examples: train, then validation, then test."""
        try:
            stream = list(generate(sum(self._sizes.values()), self.data_seed, self.limits))
        except ValueError as error:
            raise ConfigError("task.train_examples", str(error)) from error
        splits, start = {}, 0
        for name, size in self._sizes.items():
            splits[name] = TokenExamples.pack(stream[start : start + size])
            start += size
        return splits

    def examples(self, split: str) -> TokenExamples:
        """A split, not padded."""
        self.prepare()
        return self._examples[split]

    def spell(self, ids: Iterable[int]) -> list[str]:
        """The words of the expression, with a space behind."""
        return [TOKENS[i] + " " for i in ids]

    def source(self, split: str) -> Padded:
        return Padded(self.examples(split), self.spec.length)

    def majority(self, split: str) -> float:
        return self.examples(split).majority()
