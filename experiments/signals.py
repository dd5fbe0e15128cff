"""Ctrl-C and SIGTERM as a wish to stop, asked for between steps."""

import signal
import threading
from typing import Any


class Stopping:
    """A context in which the first SIGINT or SIGTERM is noted and a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        self.__exit__()
