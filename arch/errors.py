"""A mistake in a config: one line that names the field and the remedy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher


class Mistake(ValueError):
    """Something the user can mend, told in one line; programs end with exit code 2."""


class ConfigError(Mistake):
    """What a user wrote cannot be run. `path` is the full dotted field, `problem` says what is wrong and the remedy."""

    def __init__(self, path: str, problem: str):
        self.path, self.problem = path, " ".join(problem.split())
        super().__init__(f"{self.path}: {self.problem}")


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


@contextmanager
def within(path: str) -> Iterator[None]:
    """Prefixes the path of a ConfigError raised inside, so that a constructor names only its own keyword."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(join(path, error.path), error.problem) from error.__cause__


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment)."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            best = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            current.append(best)
        before, previous = previous, current
    return previous[-1]


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate a typist most likely meant; None when nothing is near."""
    scored = [
        (edit_distance(word.lower(), name.lower()), -SequenceMatcher(None, word, name).ratio(), name)
        for name in candidates
    ]
    if not scored:
        return None
    distance, _, name = min(scored)
    return name if distance <= max(1, (len(word) + 1) // 3) else None


def unknown(path: str, word: object, candidates: Iterable[str], what: str) -> ConfigError:
    """The error for a name that is not among `candidates`."""
    names = sorted(candidates)
    guess = nearest(str(word), names)
    remedy = f"; did you mean {guess!r}?" if guess else ""
    listing = f"known: {', '.join(names)}" if names else "none is known"
    return ConfigError(path, f"unknown {what} {str(word)!r}{remedy} ({listing})")
