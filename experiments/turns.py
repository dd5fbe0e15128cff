"""Two programs measured by turns on the same cores: each side a process of its own, one idle while the other runs.

Two libraries' thread pools do not share cores well, and a busy machine changes from minute to minute: so the sides
answer requests in alternation, and the ratio is taken round by round.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(threads: int, start: Callable[[], tuple[dict[str, str], Callable[..., Any]]]) -> None:
    """The child's side. start() gives versions and a function; each line of input is its arguments, as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    versions, function = start()
    print(json.dumps({"python": platform.python_version(), **versions}), flush=True)
    for line in sys.stdin:
        begin, used = time.perf_counter(), time.process_time()
        result = function(*json.loads(line))
        spent = {"seconds": time.perf_counter() - begin, "processor": time.process_time() - used}
        print(json.dumps({**spent, "result": result}), flush=True)


class Side:
    """The parent's hold on one child."""

    def __init__(self, name: str, command: list[str], threads: int, **variables: str):
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} process ended with code {self.process.wait()}")
        return json.loads(line)

    def run(self, *arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def origin() -> dict[str, Any]:
    """Of which code, by which command and when."""
    from experiments.environment import source_version  # imports jax, which a child must not do early

    commit, dirty = source_version()
    command = ["python", *sys.orig_argv[1:]]
    return {
        "commit": commit,
        "dirty": dirty,
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def provenance(*sides: Side) -> dict[str, Any]:
    """What every record says of its making."""
    from experiments.environment import device

    return {"device": device(), **origin(), "versions": {side.name: side.versions for side in sides}}
