"""Compiled programs are kept: between test runs on disk, apart from the user's own, and in one run in memory."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("ARCHLOOM_CACHE", str(Path(tempfile.gettempdir()) / f"archloom-tests-{os.getuid()}"))


@pytest.fixture(scope="session")
def programs():
    """Program, but the same one for the same config."""
    from experiments import config as configs
    from experiments.program import Program

    made = {}

    def program(config, devices=None):
        key = repr(configs.plain(config))
        if key not in made:
            made[key] = Program(config, devices)
        return made[key]

    return program


@pytest.fixture(scope="module")
def programs_kept(programs):
    """experiments.train compiles each config once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.train.Program", programs)
        yield
