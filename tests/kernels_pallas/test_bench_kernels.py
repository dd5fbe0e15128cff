"""The benchmarks of a GPU run from end to end: here at small shapes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_kernels  # noqa: E402
import gpu_cases  # noqa: E402


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_sides_that_agree_are_timed_and_recorded(tmp_path):
    record = tmp_path / "gpu.jsonl"
    case = "linear recurrence 8x4096x2560 fp32 with gradient"
    found = run("scripts/bench_kernels.py", "--tiny", "scans", "--case", case, "--record", str(record))
    assert found.returncode == 0, found.stderr
    (line,) = map(json.loads, record.read_text().splitlines())
    (result,) = line["cases"].values()
    assert set(result["milliseconds"]) == {"archloom", "associative"}
    assert max(result["relative_rms"]["associative"]) < 1e-3
    assert line["commit"]


def test_a_gpu_is_asked_for():
    found = run("scripts/bench_kernels.py", "--gpu", "scans")
    assert found.returncode == 2
    assert "sees no GPU here; --tiny" in found.stderr


def test_no_time_is_taken_where_the_results_differ():
    class Child:
        def run(self, op, case, side, tiny, timed):
            assert not timed
            return {"result": {"samples": [[1.0, 2.0 if side == "ours" else 2.5]]}}

    sides = {"ours": gpu_cases.Side(None), "peer": gpu_cases.Side(None)}
    case = gpu_cases.Case("a", [], [], sides)
    with pytest.raises(SystemExit, match="ours and peer differ"):
        bench_kernels.measure_gpu("op", case, sides, {"jax": Child()}, 1, type("Options", (), {"tiny": True}))


def test_names_of_cases_are_unique():
    for op in bench_kernels.ops_of("gpu_cases"):
        names = [case.name for case in bench_kernels.cases_of("gpu_cases", op)]
        assert len(set(names)) == len(names)
