"""Batches of a task, through Grain: which examples a training step sees is a function of (seed, step) alone."""

from collections.abc import Iterator
from typing import NotRequired, TypedDict

import grain
import numpy as np

from experiments.data.task import Task


class Batch(TypedDict):
    inputs: np.ndarray  # int32 [B T] or [B 2 T], padded with 0; or images, float32 [B H W C]
    keep: NotRequired[np.ndarray]  # bool, False on padding; not of images
    label: np.ndarray  # int32 [B], or [B T] with -1 where nothing is scored
    weight: np.ndarray  # float32 [B], 0 for a row that only fills the batch up


def make_batch(inputs: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Batch:
    tokens = np.issubdtype(inputs.dtype, np.integer)
    batch: Batch = {
        "inputs": inputs.astype(np.int32 if tokens else np.float32),
        "label": label.astype(np.int32),
        "weight": weight.astype(np.float32),
    }
    if tokens:
        batch["keep"] = inputs != 0
    return batch


def train_batches(
    task: Task,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    threads: int = 1,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Endless batches of the train split, from step start_step on; close() stops the threads.

    Epochs are shuffled anew and follow each other without a gap, so a batch may hold the end of one and the start of
    the next: step s sees examples s * batch_size to (s + 1) * batch_size - 1 of that one endless order. Hence
    train_batches(start_step=k) is the tail of train_batches() from k on, and a resumed run needs only its step.

    Args:
      seed: any whole number >= 0. It is hashed, since Grain shuffles epoch e with seed + e, which would make epoch 1
        of seed 0 the same as epoch 0 of seed 1.
      shard: (index, count) gives this process its batch_size / count rows of each batch; together the shards of one
        step hold exactly the examples of the unsharded batch.
      threads, prefetch: reading threads, and batches held ready. One thread makes about 50,000 full-size ListOps
        examples a second; the interpreter's lock makes more of them slower.
    """
    index, count = shard
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"shard {index} of {count}: the index must be below the count, and the count divide {batch_size}"
        )
    rows = batch_size // count
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.source(task.source("train")).shuffle(seed=shuffle_seed).repeat()
    if (augment := getattr(task, "augment", None)) is not None:  # its random numbers: of the seed and the place in it
        order = order.random_map(augment, seed=shuffle_seed)
    batches = (
        order.slice(slice(index, None, count))
        .batch(rows, drop_remainder=True)
        .slice(slice(start_step, None))
        .map(lambda rows_of: make_batch(rows_of["inputs"], rows_of["label"], np.ones(rows)))
    )
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def eval_batches(task: Task, split: str, batch_size: int) -> Iterator[Batch]:
    """The whole split once, in order. Rows past its end repeat the last example with weight 0."""
    source = task.source(split)
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, start + batch_size)
        rows = [source[min(i, len(source) - 1)] for i in indices.tolist()]
        yield make_batch(
            np.stack([row["inputs"] for row in rows]), np.array([row["label"] for row in rows]), indices < len(source)
        )
