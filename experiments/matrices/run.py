"""One cell: built, trained for STEPS, scored on one batch before and after."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from arch.errors import ConfigError
from experiments import config as configs
from experiments.data import pipeline
from experiments.matrices.cells import STEPS, Cell, config
from experiments.program import Program


def run(cell: Cell) -> dict[str, Any]:
    """The outcome. status: "lowered", "not lowered", "refused" (reason; nothing was compiled), "failed" (reason)."""
    begin = time.perf_counter()
    try:
        outcome = _train(cell)
    except ConfigError as refusal:
        outcome = {"status": "refused", "reason": str(refusal)}
    except Exception as error:  # one cell that breaks does not end the others
        outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**outcome, "seconds": round(time.perf_counter() - begin, 2)}


def identity(cell: Cell) -> str | None:
    """The config's hash; None where there is no config because the cell is refused."""
    try:
        return configs.config_hash(configs.resolve(config(cell)))
    except ConfigError:
        return None


def _train(cell: Cell) -> dict[str, Any]:
    resolved = configs.resolve(config(cell))
    program = Program(resolved, jax.devices()[:1])
    _trace(program)
    with jax.disable_jit():  # a hundred small programs that all cells share, not one for each cell
        state = program.init()
    start = jax.tree.map(np.asarray, state["params"])
    (before, _) = _score(program, state["params"])
    batches = program.batches()
    try:
        for _ in range(STEPS):
            state, _ = program.train_step(state, program.put(next(batches)))
    finally:
        batches.close()
    after, accuracy = _score(program, state["params"])
    return {
        "status": "lowered" if after < before else "not lowered",
        "loss_before": before,
        "loss_after": after,
        "accuracy_after": accuracy,
        "params": program.parameters,
        "unmoved": list(_unmoved(start, state["params"])),
        "config_hash": configs.config_hash(resolved),
    }


def _trace(program: Program) -> None:
    """What a config cannot tell is refused while tracing, so before the first compilation."""
    batch = program._batch(program.batch_size)
    inputs, keep = batch["inputs"], batch.get("keep")
    jax.eval_shape(program.functional.apply, program.functional.abstract(), inputs, keep)


def _score(program: Program, params: Any) -> tuple[float, float]:
    """Loss and accuracy on the one batch of the validation split."""
    (batch,) = pipeline.eval_batches(program.task, "validation", program.eval_batch_size)
    loss, correct, weight = np.asarray(program.eval_step(params, program.put(batch)), np.float64).tolist()
    return loss / weight, correct / weight


def _unmoved(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Paths of parameters that no step changed: nothing reaches them."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after)):
        if np.array_equal(a, np.asarray(b)):
            yield jax.tree_util.keystr(path, simple=True, separator="/")
