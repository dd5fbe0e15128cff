"""What a MASFormer's attention costs: closed forms, the count on its jaxpr, and its attention alone as a program.

Convention. The FLOPs are those of the two products with the scores alone: 2 K for the score of a pair of tokens and
2 V for its value, so 4 K for each pair and head, K = V. Three numbers of pairs are told apart:
    squares    whole rows, T^2 where all is seen and w^2 a block, as though nothing were causal. The paper's formula is
               in squares: of N layers, l of them full, the share saved is (1 - l/N)(1 - w/T).
    visible    the pairs that a causal model has a use for: T (T + 1) / 2 and w (w + 1) / 2 a block, half the squares
               and half the diagonal, so that what is saved stays what the formula says to within 1/T. A sliding window
               of w has T w - w (w - 1) / 2, nearly twice as many as blocks of w: (1 - l/N)(1 - w/T)^2 is saved.
    computed   what the program does. Tiles at the edge of what is visible are computed whole.
The jaxpr counter gives squares where the op `attention` runs as its reference, which computes whole rows, and what is
computed where it runs as configured.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from arch import flops
from arch.errors import ConfigError
from arch.mixers.contract import head_width
from arch.model import functional
from arch.ops.block_attention import within_blocks
from arch.spec import InputSpec
from arch.topologies.masformer import full_layers
from kernels_pallas.attention import attention

Tree = Mapping[str, Any]
SCOPE = "attention"  # the name scope of the op


@dataclasses.dataclass(frozen=True)
class Span:
    """What one token mixer sees: all, its block, or a window that moves along."""

    heads: int
    width: int  # of a head, K = V
    causal: bool
    block: int | None = None
    window: int | None = None
    implementation: str | None = None

    def squares(self, length: int) -> int | None:
        """Pairs computed by whole rows; None for a window, which has no squares."""
        if self.window is not None:
            return None
        if self.block is None or length <= self.block:
            return length**2
        return -(-length // self.block) * self.block**2

    def visible(self, length: int) -> int:
        """Pairs that are seen."""
        if self.window is not None:
            left, right = self.sides
            return sum(min(t, left) + 1 + min(length - 1 - t, right) for t in range(length))
        sizes = [min(self.block or length, length - start) for start in range(0, length, self.block or length)]
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in sizes)

    @property
    def sides(self) -> tuple[int, int]:
        assert self.window is not None
        return (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The op as the mixer calls it."""
        options: Any = {"causal": self.causal, "implementation": self.implementation}
        if self.block is not None:
            return within_blocks(q, k, v, self.block, **options)[0]
        return attention(q, k, v, window=None if self.window is None else self.sides, **options)


def span(part: Tree, width: int, causal: bool) -> Span:
    """The span of a part, a mixer of softmax attention."""
    kind = part["kind"]
    if kind not in ("softmax", "local") or part.get("order") == "interleaved":
        raise ConfigError("kind", f"closed forms are known of softmax and contiguous local attention, not of {kind}")
    shape = part["num_heads"], head_width(width, part["num_heads"], part["head_dim"]), causal
    if kind == "softmax":
        return Span(*shape, implementation=part["implementation"])
    block = part["block"] if part["block"] is not None or part["window"] is not None else 50  # the mixer's default
    return Span(*shape, block, part["window"], part["implementation"])


def roles(model: Tree) -> dict[str, Span]:
    """The spans of the two roles of a resolved section `model`."""
    if model["topology"] != "masformer":
        raise ConfigError("model.topology", f"{model['topology']} has no full and near layers; take a masformer config")
    found = {}
    for role in ("full", "near"):
        try:
            found[role] = span(model["parts"][model[role]], model["width"], model["causal"])
        except ConfigError as error:
            raise ConfigError(f"model.parts.{model[role]}.{error.path}", error.problem) from error
    return found


def layers(model: Tree) -> list[str]:
    """The role of each layer."""
    chosen = full_layers(model["depth"], model["num_full"], model["where"])
    return ["full" if i in chosen else "near" for i in range(model["depth"])]


def sides(model: Tree) -> dict[str, dict[str, Any]]:
    """What is compared: the model, and the same with all of its layers full or near."""
    extremes = {"all full": model["depth"], "masformer": None, "all near": 0}
    return {
        name: dict(model) if number is None else {**model, "num_full": number, "where": "first"}
        for name, number in extremes.items()
    }


def with_implementation(model: Tree, name: str) -> dict[str, Any]:
    """The model with one implementation of attention in both roles."""
    parts = dict(model["parts"])
    for role in ("full", "near"):
        parts[model[role]] = {**parts[model[role]], "implementation": name}
    return {**model, "parts": parts}


def closed_form(model: Tree, length: int, pairs: str) -> float | None:
    """FLOPs of an example's attention by pairs "squares" or "visible"; None where there are no squares."""
    of = {role: getattr(found, pairs)(length) for role, found in roles(model).items()}
    spans = roles(model)
    if any(of[role] is None for role in layers(model)):
        return None
    return float(sum(4 * spans[role].heads * spans[role].width * of[role] for role in layers(model)))


def counted(model: Tree, spec: InputSpec, length: int) -> float:
    """FLOPs of an example's attention: the products on the model's jaxpr under the name scope of the op."""
    net = functional(model, dataclasses.replace(spec, length=length))
    inputs = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cost = flops.count(lambda params, x: net.apply(params, x), net.abstract(), inputs)
    return float(sum(amount for scope, amount in cost.product_scopes.items() if SCOPE in scope.split("/")))


def formula(model: Tree, length: int) -> float | None:
    """The paper's (1 - l/N)(1 - w/T), the share of all-full attention that is saved; None without blocks."""
    near = roles(model)["near"]
    if near.block is None:
        return None
    share = layers(model).count("full") / model["depth"]
    return (1 - share) * (1 - min(near.block, length) / length)


def attention_flops(model: Tree, spec: InputSpec, length: int) -> dict[str, dict[str, float | None]]:
    """FLOPs of each side's attention, counted in the three ways; the count and the closed form must be one."""
    table = {}
    for name, side in sides(model).items():
        row = {pairs: closed_form(side, length, pairs) for pairs in ("squares", "visible")}
        row["computed"] = counted(side, spec, length)
        if row["squares"] is not None:
            reference = counted(with_implementation(side, "ref"), spec, length)
            if reference != row["squares"]:
                raise AssertionError(
                    f"{name} at {length}: the jaxpr has {reference:.0f} FLOPs, not {row['squares']:.0f}"
                )
        table[name] = row
    return table


def stack(model: Tree, heads: int | None = None) -> tuple[Callable[[jax.Array, jax.Array], jax.Array], tuple[int, int]]:
    """The attention of all layers alone, some of the heads: (x [1 T H K], scales [N 3 H K]) -> [1 T H K], and (H, K).

    x <- x + attention(x s_q, x s_k, x s_v), layer after layer: a factor a channel stands for the projections, so that
    every layer has its own queries, keys and values, and the gradient of x has to keep them, as in the model.
    """
    spans = {role: dataclasses.replace(found, heads=heads or found.heads) for role, found in roles(model).items()}
    shape = {(found.heads, found.width) for found in spans.values()}
    if len(shape) > 1:
        raise ConfigError("model.parts", "the two roles differ in heads; give them equal ones to run them alone")
    runs = [(role, len(list(run))) for role, run in itertools.groupby(layers(model))]

    def run(x: jax.Array, scales: jax.Array) -> jax.Array:
        start = 0
        for role, count in runs:

            def layer(x: jax.Array, s: jax.Array, role: str = role) -> tuple[jax.Array, None]:
                return x + spans[role](x * s[0], x * s[1], x * s[2]), None

            x, _ = jax.lax.scan(layer, x, scales[start : start + count])
            start += count
        return x

    return run, shape.pop()
