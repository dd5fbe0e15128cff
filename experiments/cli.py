"""What every program shares: a mistake in what the user wrote is one line on standard error and exit code 2.

Imports no jax, so that a sweep's parent and a table start at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from arch.errors import ConfigError, Mistake


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line; a flag is never guessed from its beginning."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", f"{message} (--help lists the flags)")


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a program main(argv, ...): a Mistake becomes one line on standard error and exit code 2."""

    def run(argv: Sequence[str] | None = None, *injected: object) -> int:
        try:
            return main(list(sys.argv[1:] if argv is None else argv), *injected) or 0
        except Mistake as mistake:
            print(mistake, file=sys.stderr)
            return 2
        except BrokenPipeError:  # whoever read the output has seen enough, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as a program that SIGPIPE ends

    return run
