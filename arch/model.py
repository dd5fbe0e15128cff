"""The whole network, from token ids to logits, and its functional face: plain dicts of parameters in, logits out."""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

import arch.channel_mixers
import arch.denoiser
import arch.embeddings
import arch.heads
import arch.mixers
import arch.moe
import arch.norms
import arch.positions
import arch.topologies  # noqa: F401  importing these fills the registries
from arch.auxiliary import take_losses
from arch.errors import ConfigError
from arch.layers import Dropout
from arch.norms import Group
from arch.registry import EMBEDDINGS, HEADS, POSITIONS, TOPOLOGIES, Choice
from arch.rng import streams
from arch.schema import Rate, names_of
from arch.spec import InputSpec, Spec

TOKENS = MappingProxyType({"name": "tokens"})
Params = dict[str, Any]  # nested dicts of arrays; the path of a leaf reads "topology/blocks/0/mixer/qkv/kernel"


class Options:
    """What every model has beside its topology's own options."""

    def __init__(
        self,
        *,
        embedding: Annotated[Mapping, Choice((EMBEDDINGS,))] = TOKENS,
        positions: Annotated[Mapping, Choice((POSITIONS,))],
        head: Annotated[Mapping, Choice((HEADS,))],
        dropout: Rate = 0.0,  # after the embedding, after every mixer and inside channel mixers
        causal: bool = False,  # no token sees a later one
        read: Literal["all", "pooled"] = "all",  # pooled: the last layer computes the CLS token alone
    ):
        self.embedding, self.positions, self.head = embedding, positions, head
        self.dropout, self.causal, self.read = dropout, causal, read


class Model(nnx.Module):
    """Embedding, positions, dropout, topology, head. `config` is the section `model`."""

    def __init__(self, config: Mapping[str, Any], spec: Spec, *, remat: str = "none", rngs: nnx.Rngs):
        shared = {name: config[name] for name in names_of(Options) if name in config}
        options = Options(**shared)
        body = {key: value for key, value in config.items() if key not in shared}
        width, out_width = widths(config)
        head = HEADS[options.head["name"]]
        if head.causal is not None and head.causal != options.causal:
            raise ConfigError("causal", f"the head {options.head['name']} needs causal={head.causal}")
        self.pair = spec.pair
        if getattr(head, "pairs", False) != self.pair:
            what = "two inputs an example" if self.pair else "one input an example"
            names = [name for name in HEADS.names() if getattr(HEADS[name], "pairs", False) == self.pair]
            raise ConfigError("head.name", f"the task gives {what}; choose {' or '.join(names)}")
        self.with_cls = (
            options.head.get("pooling", "cls" if "pooling" in HEADS.options(options.head["name"]) else None) == "cls"
        )
        if self.with_cls and options.causal:
            raise ConfigError(
                "head.pooling", "a CLS token stands first and sees nothing in a causal model; use last or mean"
            )
        self.embed = EMBEDDINGS.build(options.embedding, path="embedding", spec=spec, width=width, rngs=rngs)
        grid: tuple[int, ...] = self.embed.grid
        if len(grid) > 1 and self.with_cls:
            raise ConfigError("head.pooling", "a CLS token stands in a sequence; use mean, or set embedding.flatten")
        if len(grid) > 1 and options.causal:
            raise ConfigError("causal", "a grid has no order; set embedding.flatten to read it row by row")
        grid = (grid[0] + self.with_cls, *grid[1:])
        length = prod(grid)
        self.cls = nnx.Param(jnp.zeros((width,))) if self.with_cls else None
        self.positions = POSITIONS.build(options.positions, path="positions", width=width, max_length=length, rngs=rngs)
        if self.positions.rotary and len(grid) > 1:
            raise ConfigError("positions.name", "rotary counts along a sequence; set embedding.flatten or use learned")
        self.dropout = Dropout(options.dropout, rngs=rngs)
        self.topology = TOPOLOGIES.build(
            body,
            key="topology",
            causal=options.causal,
            dropout=options.dropout,
            rotary=self.positions if self.positions.rotary else None,
            max_length=length,
            grid=grid,
            remat=remat,
            rngs=rngs,
        )
        if (isinstance(spec, InputSpec) or options.causal) and any(
            isinstance(module, Group) for _, module in nnx.iter_modules(self.topology)
        ):
            raise ConfigError(
                "norm.name", "group takes its mean over all tokens, padding and later ones too; use layer or rms"
            )
        self.reads_pooled = options.read == "pooled"
        if self.reads_pooled:
            if not self.with_cls:
                raise ConfigError("read", "pooled needs a head that reads one token; set head.pooling=cls, or use all")
            if not hasattr(self.topology, "read"):
                raise ConfigError("read", f"{config['topology']} has no pooled form; use all")
            self.topology.check_read()
        if self.with_cls and not getattr(self.topology, "keeps_tokens", True):
            raise ConfigError("head.pooling", "the topology gives out other tokens than it takes, so no CLS; use mean")
        if getattr(head, "output", "logits") == "image" and not getattr(self.topology, "keeps_tokens", True):
            raise ConfigError("head.name", "a denoiser needs a token a patch, and the topology gives out other tokens")
        self.head = HEADS.build(
            options.head,
            path="head",
            width=out_width,
            num_classes=spec.num_classes,
            spec=spec,
            embedding=self.embed,
            embedding_width=width,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: Shaped[Array, "B ..."],
        keep: Bool[Array, "B ..."] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        time: Float[Array, " B"] | None = None,
        label: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B *T C"]:
        """Logits, float32: [B C] of a classifier, [B T C] of a language model; an image [B H W C] of a denoiser.

        keep None: inputs != 0 of token ids. time, and label if it is conditional, are for a denoiser (arch.denoiser).
        """
        if hasattr(self.head, "condition") != (time is not None):
            raise ConfigError("head.name", "the denoiser needs the time of each example, and no other head takes one")
        if keep is None and jnp.issubdtype(inputs.dtype, jnp.integer):
            keep = inputs != 0
        if self.pair:  # the two inputs of an example are rows of their own
            inputs = inputs.reshape(-1, *inputs.shape[2:])
            keep = None if keep is None else keep.reshape(-1, *keep.shape[2:])
        with jax.named_scope("embed"):
            x = self.embed(inputs)
        if self.cls is not None:
            if segment_ids is not None:
                raise ConfigError("head.pooling", "packed sequences share one CLS token; use a language model head")
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[2])), x], axis=1)
            keep = None if keep is None else jnp.pad(keep, [(0, 0), (1, 0)], constant_values=True)
        with jax.named_scope("positions"):
            x = self.positions(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)  # places in row-major order
        if time is not None:
            with jax.named_scope("head"):
                x = x + self.head.condition(time, label).reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)
        with jax.named_scope("topology"):
            x = self.dropout(x)
            if self.reads_pooled:
                x, keep = self.topology.read(x, 1, keep=keep), None
            else:
                x = self.topology(x, keep=keep, segment_ids=segment_ids)
        if keep is not None and hasattr(self.topology, "kept"):
            keep = self.topology.kept(keep)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if keep is None:
            keep = jnp.ones(x.shape[:2], bool)
        if self.pair:
            x, keep = (a.reshape(-1, 2, *a.shape[1:]) for a in (x, keep))
        with jax.named_scope("head"):
            return self.head(x, keep)

    def init_state(self, batch: int, max_length: int) -> dict[str, Any]:
        """The decode state before the first token; causal language models only."""
        if self.head.causal is not True:
            raise ConfigError("head.name", "decoding needs the head language_model")
        return {"length": jnp.zeros((), jnp.int32), "topology": self.topology.init_state(batch, max_length)}

    def step(self, inputs: Int[Array, " B"], state: dict[str, Any]) -> tuple[Float[Array, "B C"], dict[str, Any]]:
        """Logits of the token after `inputs`, and the state that includes it."""
        x = self.positions(self.embed(inputs)[:, None], state["length"])[:, 0]
        x, after = self.topology.step(x, state["topology"])
        logits = self.head(x[:, None], jnp.ones((x.shape[0], 1), bool))[:, 0]
        return logits, {"length": state["length"] + 1, "topology": after}


class Functional:
    """A model as pure functions over plain nested dicts of arrays."""

    def __init__(self, config: Mapping[str, Any], spec: Spec, *, remat: str = "none"):
        self.config, self.spec, self.remat = config, spec, remat
        graphs: list[Any] = []

        def leaves() -> Any:
            model = self._make(jax.random.key(0))
            training = self._split(model)
            model.eval()
            evaluating = self._split(model)
            graphs.extend((training[0], evaluating[0]))
            return training[1:], evaluating[1:]

        training, evaluating = jax.eval_shape(leaves)
        self._training, self._evaluating = (graphs[0], *training), (graphs[1], *evaluating)

    def _make(self, key: Array) -> Model:
        return Model(self.config, self.spec, remat=self.remat, rngs=streams(params=key, dropout=0))

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
            _keys(jax.random.fold_in(base, i), leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return nnx.merge(graph, from_nested(params, template), jax.tree.unflatten(tree, filled))

    def conditions(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `apply` needs beside the inputs."""
        times = {"time": jax.ShapeDtypeStruct((batch,), jnp.float32)}
        return times if getattr(HEADS[self.config["head"]["name"]], "output", "logits") == "image" else {}

    def apply(
        self,
        params: Params,
        inputs: Shaped[Array, "B ..."],
        keep: Bool[Array, "B ..."] | None = None,
        key: Array | None = None,
        **conditions: Array | None,
    ) -> Float[Array, "B *T C"]:
        """Logits in float32; computes in the dtype of the parameters. key None: deterministic.

        conditions: time and label, of a denoiser.
        """
        return self.apply_with_losses(params, inputs, keep, key, **conditions)[0]

    def apply_with_losses(
        self,
        params: Params,
        inputs: Shaped[Array, "B ..."],
        keep: Bool[Array, "B ..."] | None = None,
        key: Array | None = None,
        **conditions: Array | None,
    ) -> tuple[Float[Array, "B *T C"], Float[Array, ""]]:
        """Logits, and the sum of the losses that layers add to the task's (arch.auxiliary)."""
        model = self.module(params, key)
        logits = model(inputs, keep, **conditions)
        return logits, take_losses(model)


def _keys(key: Array, shape: tuple[int, ...]) -> Array:
    """A key, or one for each of the layers that are stacked on leading axes."""
    return jax.random.split(key, shape) if shape else key


def widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """The widths that a topology takes in and gives out, from the section `model`."""
    named = getattr(TOPOLOGIES[config["topology"]], "widths", None)
    return (config["width"], config["width"]) if named is None else named(config)


def functional(config: Mapping[str, Any], spec: Spec, *, remat: str = "none") -> Functional:
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
