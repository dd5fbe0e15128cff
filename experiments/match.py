"""Equal budgets: the width at which a model has a given number of parameters or FLOPs.

The width is solved first, the hidden width of the channel mixer growing with it; what the grid of possible widths
leaves open, the hidden width alone then closes. Costs come from shapes, so a search takes a second or two.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arch import accounting
from arch.errors import ConfigError, unknown
from arch.spec import Spec

TOLERANCE = 0.01
LARGEST = 1 << 16  # no width beyond this is tried
SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
BUDGETS: Mapping[str, Callable[[Mapping[str, Any], Spec], float]] = {
    "params": accounting.count_params,
    "flops": accounting.forward_flops,
}


@dataclass(frozen=True)
class Match:
    model: dict[str, Any]
    overrides: dict[str, Any]  # what changed, by config path
    budget: str
    target: float
    reached: float

    def __str__(self) -> str:
        off = 100 * (self.reached / self.target - 1)
        changes = " ".join(f"--config.{path}={value}" for path, value in self.overrides.items()) or "no change"
        return f"matched {self.budget}={self.target:.4g}: {self.reached:.4g} ({off:+.2f} %) with {changes}"


def number(text: str) -> float:
    """2.1M, 3G, 5e8 as a float. Raises ValueError."""
    scale = SUFFIXES.get(text[-1:].upper(), 1.0)
    return float(text[:-1] if scale != 1.0 else text) * scale


def parse(text: str) -> dict[str, str]:
    """ "layers=2,params=2.1M" as a dict."""
    wanted = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if key not in (*BUDGETS, "layers"):
            raise unknown("--match", key, [*BUDGETS, "layers"], "budget")
        if not equals or not value:
            raise ConfigError("--match", f"{key} has no value; write {key}=2.1M")
        wanted[key] = value
    if len(wanted.keys() & BUDGETS.keys()) > 1:
        raise ConfigError("--match", "params and flops are two budgets for one width; give one of them")
    return wanted


def match(model: Mapping[str, Any], spec: Spec, *, layers: int | None = None, **budget: float) -> Match:
    """The model at `layers` layers whose params or flops are within 1 % of the budget; without one, of its own."""
    if "width" not in model:
        raise ConfigError("--match", f"the topology {model['topology']} has several widths and none to solve for")
    if layers is not None and "layers" not in model:
        raise ConfigError("--match", f"the topology {model['topology']} has no pattern `layers` to cut; leave layers=")
    name, target = next(iter(budget.items()), ("params", 0.0))
    cost = BUDGETS[name]
    target = target or cost(model, spec)
    changed = _with_layers(model, layers)

    def at(width: int, hidden: int | None = None) -> float | None:
        try:
            return cost(_resized(changed, width, hidden), spec)
        except ConfigError:  # heads that do not divide it, say
            return None

    width = _solve(at, target, changed["width"])
    found = _resized(changed, width)
    reached = cost(found, spec)
    if abs(reached / target - 1) > TOLERANCE and _hidden(found) is not None:
        hidden = _solve(lambda hidden: at(width, hidden), target, _hidden(found) or 1)
        found = _resized(changed, width, hidden)
        reached = cost(found, spec)
    overrides = {f"model.{path}": value for path, value in _differences(model, found)}
    result = Match(found, overrides, name, target, reached)
    if abs(reached / target - 1) > TOLERANCE:
        raise ConfigError("--match", f"no width comes within 1 % of {name}={target:.4g}; nearest: {result}")
    return result


def _solve(cost: Callable[[int], float | None], target: float, start: int) -> int:
    """The integer whose cost, growing, is nearest the target, among start and every `unit` above and below it."""
    unit = next((u for u in range(1, start + 1) if cost(start + u) is not None), None)
    if unit is None:
        raise ConfigError("--match", f"no width between {start} and {2 * start} can be built")

    def at(k: int) -> float:
        value = cost(first + k * unit)
        if value is None:
            raise ConfigError("--match", f"width {first + k * unit} cannot be built though {start} can")
        return value

    first = start % unit or unit
    low, high = 0, max((start - first) // unit, 1)
    while at(high) < target:
        low, high = high, 2 * high
        if first + high * unit > LARGEST:
            raise ConfigError("--match", f"the budget {target:.4g} needs a width beyond {LARGEST}; check its unit")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    return first + unit * min((low, high), key=lambda k: abs(at(k) - target))


def _with_layers(model: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    changed = copy.deepcopy(dict(model))
    if layers is not None:
        changed["depth"], changed["layers"] = layers, tuple(changed["layers"][:layers])
    return changed


def _channel(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The one channel mixer of all layers; None without one, or where a pattern has several."""
    name = model.get("channel")
    return model["parts"][name] if isinstance(name, str) else None


def _hidden(model: Mapping[str, Any]) -> int | None:
    """The hidden width of the channel mixer as it is built; None without one."""
    part = _channel(model)
    if part is None or (part.get("hidden") is None and part.get("ratio") is None):
        return None
    return part["hidden"] if part.get("hidden") is not None else max(1, round(part["ratio"] * model["width"]))


def _resized(model: Mapping[str, Any], width: int, hidden: int | None = None) -> dict[str, Any]:
    resized = copy.deepcopy(dict(model))
    resized["width"] = width
    part = _channel(resized)
    if part is not None:
        if hidden is not None:
            part["hidden"] = hidden
        elif part.get("hidden") is not None:
            part["hidden"] = max(1, round(part["hidden"] * width / model["width"]))
    return resized


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in after.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            found += _differences(before[key], value, here)
        elif value != before[key]:
            found.append((here, value))
    return found
