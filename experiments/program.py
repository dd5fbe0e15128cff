"""A config as compiled functions over placed arrays: what train, evaluate and the benchmarks share."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import experiments.data  # noqa: F401  registers the tasks
from arch import model
from arch.errors import within
from arch.registry import TASKS
from arch.spec import InputSpec
from experiments import config as configs
from experiments import objectives, optim, sharding, step
from experiments.data import pipeline

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
AHEAD = 3  # steps the host may run ahead of the device: enough to keep it busy, few enough to hear of a fault soon


class Program:
    """Task, model, optimiser and mesh of a resolved config. Making one checks everything and compiles nothing."""

    def __init__(self, config: Any, devices: Any = None):
        self.config = config = configs.plain(config)
        train = config["train"]
        self.steps, self.batch_size = train["steps"], train["batch_size"]
        self.eval_batch_size = train["eval_batch_size"] or self.batch_size
        if jax.process_count() > 1:
            raise NotImplementedError("one process only: batches and checkpoints are not yet split between processes")
        with within("config"):
            self.mesh = sharding.make_mesh(config["mesh"], devices)
            self.task = TASKS.build(config["task"], path="task")
            self.objective = objectives.build(config)
            self.optimizer = optim.build(config["optimizer"], self.steps)
            with within("model"):
                self.functional = model.functional(config["model"], self.task.spec, remat=train["remat"])
            params = self.functional.abstract()
            specs = sharding.parameter_specs(params, config["sharding"], self.mesh)
            spec = self.task.spec
            length = spec.length if isinstance(spec, InputSpec) else None
            check = functools.partial(sharding.check_batch, self.mesh, length=length)
            check(batch_size=self.batch_size, accumulate=self.optimizer.accumulate)
            check(batch_size=self.eval_batch_size, field="train.eval_batch_size")
        self._init = functools.partial(
            step.init_state,
            init=self.functional.init,
            optimizer=self.optimizer,
            latch=train["on_nonfinite"] != "skip",
            prng=train["prng"],
        )
        state = jax.eval_shape(self._init, 0)
        self.shardings = sharding.state_shardings(state, specs, self.mesh)
        self.state = jax.tree.map(  # abstract, with shardings
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, self.shardings
        )
        self.evaluated = "ema" if "ema" in state else "params"  # the parameters that evaluation uses
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.replicated = NamedSharding(self.mesh, P())
        self.batch_shardings = sharding.batch_shardings(self._batch(self.batch_size, evaluation=True), self.mesh)

    def _batch(self, size: int, evaluation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        spec = self.task.spec
        inputs = (size, *spec.shape)
        shapes = {"inputs": (inputs, spec.dtype), "label": (inputs if self.task.token_labels else (size,), "int32")}
        if isinstance(spec, InputSpec):
            shapes["keep"] = (inputs, "bool")
        shapes["weight"] = ((size,), "float32")
        if evaluation and self.objective.draws:
            shapes["index"] = ((size,), "int32")
        return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}

    @functools.cached_property
    def init(self) -> Any:
        """() -> a fresh state, made where it will live."""
        return jax.jit(functools.partial(self._init, jnp.uint32(self.config["seed"])), out_shardings=self.shardings)

    @functools.cached_property
    def train_step(self) -> Any:
        """Compiled: (state, batch) -> (state, step.metrics_of(objective)), the state donated."""
        batch = self._batch(self.batch_size)
        train_step = functools.partial(
            step.train_step,
            apply=self.functional.apply_with_losses,
            optimizer=self.optimizer,
            dtype=DTYPES[self.config["train"]["precision"]],
            objective=self.objective,
            prng=self.config["train"]["prng"],
        )
        jitted = jax.jit(
            train_step,
            in_shardings=(self.shardings, {name: self.batch_shardings[name] for name in batch}),
            out_shardings=(self.shardings, self.replicated),
            donate_argnums=0,
        )
        return jitted.lower(self.state, batch).compile()

    @functools.cached_property
    def eval_step(self) -> Any:
        """Compiled: (params, batch) -> the objective's sums."""
        dtype = DTYPES[self.config["train"]["precision"]]
        batch = self._batch(self.eval_batch_size, evaluation=True)
        jitted = jax.jit(
            functools.partial(step.eval_step, apply=self.functional.apply, dtype=dtype, objective=self.objective),
            in_shardings=(self.shardings["params"], self.batch_shardings),
            out_shardings=self.replicated,
        )
        return jitted.lower(self.state["params"], batch).compile()

    def put(self, batch: Mapping[str, Any]) -> Any:
        """The batch on its devices; the copy overlaps with the step that runs."""
        return jax.device_put(dict(batch), {name: self.batch_shardings[name] for name in batch})

    def batches(self, start: int = 0) -> Any:
        """The endless training data from batch `start` on, an iterator with close()."""
        return pipeline.train_batches(self.task, batch_size=self.batch_size, seed=self.config["seed"], start_step=start)

    def evaluate(
        self, params: Any, split: str, stopping: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The objective's metrics and "examples", over a whole split; None once `stopping` says so."""
        total, running = np.zeros(len(self.objective.metrics) + 1), collections.deque[Any]()
        for n, rows in enumerate(pipeline.eval_batches(self.task, split, self.eval_batch_size)):
            if stopping():
                return None
            batch: dict[str, Any] = dict(rows)
            if self.objective.draws:
                batch["index"] = np.arange(self.eval_batch_size, dtype=np.int32) + n * self.eval_batch_size
            running.append(self.eval_step(params, self.put(batch)))
            if len(running) > AHEAD:
                total += np.asarray(running.popleft(), np.float64)
        *sums, weight = sum(map(np.asarray, running), total).tolist()
        means = {name: value / weight for name, value in zip(self.objective.metrics, sums)}
        return {**means, "examples": self.task.splits[split]}


def different(params: Any, others: Any) -> str | None:
    """The path of the first parameter that two models do not share in shape; None if they share all."""
    mine, theirs = ({path: leaf.shape for path, leaf in sharding.paths(tree).items()} for tree in (params, others))
    return next((path for path in {**mine, **theirs} if mine.get(path) != theirs.get(path)), None)
