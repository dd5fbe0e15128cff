"""The whole network, from token ids to logits, and its functional face: plain dicts of parameters in, logits out."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import arch.channel_mixers
import arch.heads
import arch.mixers
import arch.norms
import arch.positions
import arch.topologies  # noqa: F401  importing these fills the registries
from arch.errors import ConfigError
from arch.layers import Dropout
from arch.registry import HEADS, POSITIONS, TOPOLOGIES, Choice
from arch.schema import Rate
from arch.spec import InputSpec

Params = dict[str, Any]  # nested dicts of arrays; the path of a leaf reads "topology/blocks/0/mixer/qkv/kernel"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every model has beside its topology's own options."""

    positions: Annotated[Mapping, Choice((POSITIONS,))]
    head: Annotated[Mapping, Choice((HEADS,))]
    dropout: Rate = 0.0  # after the embedding, after every mixer and inside channel mixers
    causal: bool = False  # no token sees a later one


class Model(nnx.Module):
    """Embedding (N(0, 1) at first), positions, dropout, topology, head. `config` is the section `model`."""

    def __init__(self, config: Mapping[str, Any], spec: InputSpec, *, remat: str = "none", rngs: nnx.Rngs):
        shared = {field.name: config[field.name] for field in fields(Options) if field.name in config}
        options = Options(**shared)
        body = {key: value for key, value in config.items() if key not in shared}
        width = config["width"]
        head = HEADS[options.head["name"]]
        if head.causal is not None and head.causal != options.causal:
            raise ConfigError("causal", f"the head {options.head['name']} needs causal={head.causal}")
        self.with_cls = (
            options.head.get("pooling", "cls" if "pooling" in HEADS.options(options.head["name"]) else None) == "cls"
        )
        if self.with_cls and options.causal:
            raise ConfigError(
                "head.pooling", "a CLS token stands first and sees nothing in a causal model; use last or mean"
            )
        length = spec.length + self.with_cls
        self.embed = nnx.Embed(spec.vocab_size, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((width,))) if self.with_cls else None
        self.positions = POSITIONS.build(options.positions, path="positions", width=width, max_length=length, rngs=rngs)
        self.dropout = Dropout(options.dropout, rngs=rngs)
        self.topology = TOPOLOGIES.build(
            body,
            key="topology",
            causal=options.causal,
            dropout=options.dropout,
            rotary=self.positions if self.positions.rotary else None,
            max_length=length,
            remat=remat,
            rngs=rngs,
        )
        self.head = HEADS.build(options.head, path="head", width=width, num_classes=spec.num_classes, rngs=rngs)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        keep: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B *T C"]:
        """Logits, float32: [B C] of a classifier, [B T C] of a language model. keep None: inputs != 0."""
        keep = inputs != 0 if keep is None else keep
        with jax.named_scope("embed"):
            x = self._embed(inputs)
        if self.cls is not None:
            if segment_ids is not None:
                raise ConfigError("head.pooling", "packed sequences share one CLS token; use a language model head")
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[2])), x], axis=1)
            keep = jnp.pad(keep, [(0, 0), (1, 0)], constant_values=True)
        with jax.named_scope("positions"):
            x = self.positions(x)
        with jax.named_scope("topology"):
            x = self.topology(self.dropout(x), keep=keep, segment_ids=segment_ids)
        with jax.named_scope("head"):
            return self.head(x, keep)

    def _embed(self, inputs: Int[Array, "*A"]) -> Float[Array, "*A D"]:
        return jnp.take(self.embed.embedding[...], inputs, axis=0)  # nnx.Embed would widen bf16 to float32

    def init_state(self, batch: int, max_length: int) -> dict[str, Any]:
        """The decode state before the first token; causal language models only."""
        if self.head.pooling is not None:
            raise ConfigError("head.name", "decoding needs the head language_model")
        return {"length": jnp.zeros((), jnp.int32), "topology": self.topology.init_state(batch, max_length)}

    def step(self, inputs: Int[Array, " B"], state: dict[str, Any]) -> tuple[Float[Array, "B C"], dict[str, Any]]:
        """Logits of the token after `inputs`, and the state that includes it."""
        x = self.positions(self._embed(inputs)[:, None], state["length"])[:, 0]
        x, after = self.topology.step(x, state["topology"])
        logits = self.head(x[:, None], jnp.ones((x.shape[0], 1), bool))[:, 0]
        return logits, {"length": state["length"] + 1, "topology": after}


class Functional:
    """A model as pure functions over plain nested dicts of arrays."""

    def __init__(self, config: Mapping[str, Any], spec: InputSpec, *, remat: str = "none"):
        self.config, self.spec, self.remat = config, spec, remat
        model = nnx.eval_shape(lambda: self._make(jax.random.key(0)))
        self._training = self._split(model)
        model.eval()
        self._evaluating = self._split(model)

    def _make(self, key: Array) -> Model:
        return Model(self.config, self.spec, remat=self.remat, rngs=nnx.Rngs(params=key, dropout=0))

    def _split(self, model: Model) -> tuple[Any, Any, Any]:
        states: Any = nnx.split(model, nnx.Param, nnx.RngState, ...)
        graph, params, random, rest = states
        if jax.tree.leaves(rest):
            raise TypeError(f"variables other than parameters and random state: {rest}")
        return graph, params, random

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters."""
        return jax.jit(lambda key: to_nested(self._split(self._make(key))[1]))(key)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters; nothing runs."""
        return to_nested(self._evaluating[1])

    def module(self, params: Params, key: Array | None = None) -> Model:
        """The model holding these parameters; with a key, dropout is on and its random numbers come from the key."""
        graph, template, random = self._evaluating if key is None else self._training
        leaves, tree = jax.tree.flatten(random)
        base = jax.random.key(0) if key is None else key
        filled = [
            jax.random.fold_in(base, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return nnx.merge(graph, from_nested(params, template), jax.tree.unflatten(tree, filled))

    def apply(
        self,
        params: Params,
        inputs: Int[Array, "B T"],
        keep: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B *T C"]:
        """Logits in float32; computes in the dtype of the parameters. key None: deterministic."""
        return self.module(params, key)(inputs, keep)


def functional(config: Mapping[str, Any], spec: InputSpec, *, remat: str = "none") -> Functional:
    """The model of a config's section `model`, for a task's inputs."""
    return Functional(config, spec, remat=remat)


def _paths(state: Any) -> list[tuple[str, ...]]:
    names = []
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
        names.append(tuple(str(k) for k in keys if str(k) not in ("value", "raw_value")))
    return names


def to_nested(state: Any) -> Params:
    """An nnx.State as nested dicts with string keys."""
    nested: Params = {}
    for path, leaf in zip(_paths(state), jax.tree.leaves(state)):
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return nested


def from_nested(params: Params, template: Any) -> Any:
    """The nnx.State of `template`'s structure with the leaves of `params`."""

    def leaf(path: tuple[str, ...]) -> Any:
        node: Any = params
        for key in path:
            node = node[key]
        return node

    return jax.tree.unflatten(jax.tree.structure(template), [leaf(path) for path in _paths(template)])
