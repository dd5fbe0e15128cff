"""Imports point one way: kernels_pallas <- arch <- experiments <- scripts; configs name parts and import none."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels_pallas": {"kernels_pallas"},
    "arch": {"arch", "kernels_pallas"},
    "experiments": {"experiments", "arch", "kernels_pallas"},
    "configs": {"configs"},
    "scripts": {"scripts", "experiments", "arch", "kernels_pallas", "configs"},
}


def imported(file: Path) -> set[str]:
    """First names of all modules the file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = [*(ROOT / package).rglob("*.py")]
    assert files or package == "scripts"
    for file in files:
        wrong = (imported(file) & ALLOWED.keys()) - ALLOWED[package]
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_no_forbidden_interfaces() -> None:
    """The design's list: old or deprecated interfaces, and code from data."""
    forbidden = {"clu", "tensorflow", "torch", "pickle"}
    for package in ("kernels_pallas", "arch", "experiments", "configs"):
        for file in (ROOT / package).rglob("*.py"):
            assert not imported(file) & forbidden, file
