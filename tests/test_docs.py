"""The documentation names only what exists. Its code is executed by the build (slow)."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {"arch/mixers/shift.py"}  # the mixer that docs/add-a-mixer.md makes
TOPS = "arch|configs|docs|experiments|kernels_pallas|scripts|tests"


def text(page: Path) -> str:
    return page.read_text().replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_programs_exist(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w./-])((?:{TOPS})/[\w./-]*\w)", text(page))) - EXAMPLES
    for path in named:
        if not re.search(r"/[A-Z]+\b(?!\.md)", path) and "_build" not in path:  # NAME stands for any name
            assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m ((?:experiments|tests)[\w.]*)", text(page))):
        assert importlib.util.find_spec(module), module


def commands() -> list[str]:
    found = re.findall(r"python -m experiments\.\w+ [^\n`|]*--config=configs/[^\n`|]*", "\n".join(map(text, PAGES)))
    plain = {" ".join(command.split("#")[0].split("||")[0].split()) for command in found}
    return sorted(command for command in plain if "$" not in command)  # those of loops are run by the build


@pytest.mark.parametrize("command", commands())
def test_commands_resolve(command: str) -> None:
    """Every --config in the pages is a config, its overrides too, but for the mistake that is shown as one."""
    words = [word for word in shlex.split(command) if word.startswith(("--config=", "--config."))]
    source, overrides, _ = config.split(words, cli.Parser())
    if "experiments.sweep" in command:
        assert hasattr(config.module(source), "get_sweep")
    elif "model.widht" in overrides:
        with pytest.raises(config.ConfigError, match="did you mean 'width'"):
            config.configure(source, overrides)
    else:
        config.configure(source, overrides)


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text().split("\n")
    assert {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"} <= set(index)


@pytest.mark.slow
def test_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="needs the extra `docs`; scripts/test --all installs it")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    built = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in (tmp_path / "html").glob("*.html"):  # read offline as online
        assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=\"(?:https?:)?//", page.read_text()), page.name
