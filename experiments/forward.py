"""A config's inference pass on random inputs, compiled: its costs, its memory, and its parts run apart."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arch import accounting, flops
from arch.errors import ConfigError
from arch.layers import cast
from arch.model import functional
from arch.registry import TASKS
from arch.spec import InputSpec, Spec
from arch.topologies.block import Block
from arch.topologies.block import mix as run_mixer
from arch.topologies.stack import Stack
from experiments import config as configs
from experiments.program import DTYPES


class Forward:
    """The forward pass at one batch and length. Fresh parameters; random inputs, none of them padding."""

    def __init__(self, config: Any, batch: int, length: int | None = None):
        tree = configs.plain(config)
        self.spec = of_length(TASKS.build(tree["task"]).spec, length)
        self.batch, self.dtype = batch, DTYPES[tree["train"]["precision"]]
        self.net = functional(tree["model"], self.spec)
        self.params = jax.jit(lambda p: cast(p, self.dtype))(self.net.init(jax.random.key(tree["seed"])))
        self.inputs = jax.device_put(random_inputs(self.spec, batch))
        self._compiled = jax.jit(lambda p, x: self.net.apply(p, x)).lower(self.params, self.inputs).compile()

    def __call__(self) -> jax.Array:
        return jax.block_until_ready(self._compiled(self.params, self.inputs))

    def facts(self) -> dict[str, Any]:
        """Parameters, FLOPs of the whole batch, and what the compiler says of the program's memory, in bytes."""
        memory = self._compiled.memory_analysis()
        kinds = ("argument", "output", "temp")
        sizes = {} if memory is None else {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds}
        return {
            "params": accounting.size(self.params),
            "flops": flops.count(lambda p, x: self.net.apply(p, x), self.params, self.inputs).flops,
            "compiled_bytes": {**sizes, "total": sum(sizes.values())} if sizes else None,
        }

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The token mixers, their matrices alone, and the channel mixers, each over all layers, as compiled calls.

        Every layer gets the same random tokens, so that nothing depends on the scale of what others give out. {} for
        topologies that are no plain row of blocks, or where the last one does not compute all tokens.
        """
        module = self.net.module(self.params)
        topology = module.topology
        blocks = list(topology.blocks) if isinstance(topology, Stack) else []
        if (
            not blocks
            or module.reads_pooled
            or topology.loops > 1
            or not all(isinstance(block, Block) for block in blocks)
        ):
            return {}
        rows = self.batch * (2 if self.spec.pair else 1)
        shape = (rows, module.embed.grid[0] + module.with_cls, *module.embed.grid[1:])
        keep = jnp.ones(shape, bool)

        def tokens(width: int) -> jax.Array:
            return jax.random.normal(jax.random.key(0), (*shape, width), self.dtype)

        def mixer(block: Block, x: dict[int, jax.Array]) -> list[jax.Array]:
            return [run_mixer(block.mixer, x[width], keep=keep)]

        def projections(block: Block, x: dict[int, jax.Array]) -> list[jax.Array]:
            return [each(x[each.in_features]) for each in matrices(block.mixer)]

        def channel(block: Block, x: dict[int, jax.Array]) -> list[jax.Array]:
            return [] if block.channel is None else [block.channel(x[width])]

        width = self.net.config["width"]
        widths = {width, *(each.in_features for block in blocks for each in matrices(block.mixer))}
        x = {each: tokens(each) for each in widths}
        functions = {"mixer": mixer, "projections": projections, "channel": channel}
        return {name: self._over(blocks, function, x) for name, function in functions.items()}

    def _over(self, blocks: list[Block], function: Callable[..., list[jax.Array]], x: Any) -> Callable[[], Any]:
        graph, state = nnx.split(nnx.List(blocks))

        def run(state: Any, x: Any) -> list[jax.Array]:
            return [y for block in nnx.merge(graph, state) for y in function(block, x)]

        compiled = jax.jit(run).lower(state, x).compile()
        return lambda: jax.block_until_ready(compiled(state, x))


def matrices(module: nnx.Module) -> list[nnx.Linear]:
    return [each for _, each in nnx.iter_modules(module) if isinstance(each, nnx.Linear)]


def of_length(spec: Spec, length: int | None) -> Spec:
    """The inputs of a task at another length."""
    if length is None:
        return spec
    if not isinstance(spec, InputSpec):
        raise ConfigError("--lengths", "the task's inputs are images; leave the flag out")
    return dataclasses.replace(spec, length=length)


def random_inputs(spec: Spec, batch: int) -> np.ndarray:
    """Ids other than padding's 0, or pixels N(0, 1)."""
    rng, shape = np.random.default_rng(0), (batch, *spec.shape)
    if isinstance(spec, InputSpec):
        return rng.integers(1, spec.vocab_size, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)
