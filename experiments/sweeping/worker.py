"""Starts one worker of a sweep so that it neither outlives its parent unnoticed nor runs twice.

Used as a script, with the standard library only: `python -I -S worker.py PARENT_PID COMMAND...` asks the kernel for
SIGTERM when the parent dies (Linux; elsewhere the worker goes on), then becomes COMMAND. The worker inherits one open
file, `worker.lock` in its folder, whose flock lives exactly as long as the worker: who can take it knows it is gone.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(command: Sequence[str], folder: Path) -> subprocess.Popen | None:
    """Runs command with its output appended to folder/log.txt; None if another worker holds the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "worker.lock", "ab") as lock, open(folder / "log.txt", "ab") as log:
        if not _take(lock):
            return None
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which forwards it once
        )


def is_running(folder: Path) -> bool:
    """Whether a worker, ours or one left by a killed parent, is alive in folder."""
    try:
        with open(folder / "worker.lock", "rb") as lock:
            return not _take(lock)
    except FileNotFoundError:
        return False


def _take(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _become(parent: int, command: Sequence[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.execv(command[0], list(command))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
