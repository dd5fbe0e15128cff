"""Plans side by side: what each config costs, and how often the first one's cost goes into it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.plan import Plan, binary, si

COLUMNS: Mapping[str, tuple[Callable[[Plan], float], Callable[[float], str]]] = {
    "parameters": (lambda plan: plan.account.params, si),
    "no embedding": (lambda plan: plan.account.params - embedding(plan), si),
    "FLOPs": (lambda plan: plan.account.flops, si),
    "train FLOPs": (lambda plan: plan.account.train_flops, si),
    "activations": (lambda plan: plan.account.activation_bytes, binary),
}


def embedding(plan: Plan) -> int:
    """Parameters of what turns inputs into vectors, a CLS token included."""
    return sum(part.params for part in plan.account.parts if part.name.startswith("embedding"))


def costs(plan: Plan) -> dict[str, float]:
    """Of one example of the longest length; activations as an estimate, see experiments.plan."""
    return {name: cost(plan) for name, (cost, _) in COLUMNS.items()}


def ratios(plans: Sequence[Plan]) -> list[dict[str, float]]:
    """For each plan but the first: the first one's costs divided by its own."""
    first, *others = [costs(plan) for plan in plans]
    return [{name: first[name] / other[name] for name in first} for other in others]


def text(plans: Sequence[Plan]) -> str:
    """A row a config, then the ratios."""
    wide = max(len(plan.source) for plan in plans) + 2
    lines = ["of one example:".ljust(wide) + "".join(f"{name:>16}" for name in COLUMNS)]
    for plan in plans:
        found = costs(plan)
        cells = (shown(found[name]).strip() for name, (_, shown) in COLUMNS.items())
        lines.append(plan.source.ljust(wide) + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", f"{plans[0].source}, divided by"]
    for plan, found in zip(plans[1:], ratios(plans)):
        lines.append(plan.source.ljust(wide) + "".join(f"{f'{found[name]:.2f}x':>16}" for name in COLUMNS))
    return "\n".join(lines)


def as_json(plans: Sequence[Plan]) -> dict[str, Any]:
    rows = [{"source": plan.source, "config_hash": plan.config_hash, **costs(plan)} for plan in plans]
    divided = [{"source": plan.source, **found} for plan, found in zip(plans[1:], ratios(plans))]
    return {"plans": rows, "ratios": divided}
