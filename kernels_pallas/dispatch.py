"""Choice of an op's implementation: a name asked for is never swapped for another."""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger("archloom")
_logged: set[str] = set()


def call(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    auto: Sequence[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the named implementation, or with None the first in `auto` that does not refuse its inputs.

    Raises:
      KeyError: no implementation has that name.
      NotImplementedError: it refuses these inputs; with None, all in `auto` do, and each one's reason is given.
    """
    if implementation is not None:
        if implementation not in implementations:
            near = difflib.get_close_matches(implementation, implementations, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise KeyError(f"{op} has no implementation {implementation!r}, only {sorted(implementations)}{hint}")
        return implementations[implementation](*args, **kwargs)
    reasons = []
    for name in auto:
        try:
            result = implementations[name](*args, **kwargs)
        except NotImplementedError as refusal:
            reasons.append(f"{name}: {refusal}")
            continue
        _log_once(op, name, reasons)
        return result
    raise NotImplementedError(f"{op}: every implementation refuses these inputs. " + "; ".join(reasons))


def _log_once(op: str, name: str, reasons: list[str]) -> None:
    """Says which implementation was chosen and why not an earlier one; the same choice is said once a process."""
    message = f"{op}: chose {name!r}" + (f" ({'; '.join(reasons)})" if reasons else "")
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
