"""What the benchmarks share: sides that take turns (experiments/turns.py), and the check for torch."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a source tree that is not installed

from experiments.turns import Side, provenance, serve

__all__ = ["Side", "provenance", "serve", "torch_missing"]


def torch_missing(python: str) -> bool:
    """Says so, if the interpreter has no torch."""
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        return False
    remedy = "install the extra `peers` (pip install -e '.[peers]') or name an interpreter with --torch-python"
    print(f"{python} has no torch; {remedy}", file=sys.stderr)
    return True
