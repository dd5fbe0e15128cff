"""A sweep of the real trainer, killed by SIGKILL, ends with the same bits as an unbroken one."""

import json
import subprocess
import sys
import time

import pytest

CONFIG = """
from configs import parts

def get_config(mixer: str = "linear"):
    config = parts.base(task="listops", max_length=24, train_examples=200, validation_examples=50, test_examples=50,
                        batch_size=8, steps=400, data_dir="DATA")
    config.model = parts.metaformer(width=16, depth=2, mixer={"kind": mixer, "num_heads": 2})
    config.train.update(eval_every=100, save_every=20, log_every=10)
    return config

def get_sweep():
    return [{"seed": 0}, {"seed": 1, "arg": "softmax"}]
"""


@pytest.mark.slow
def test_killed_sweep_ends_with_the_same_parameters(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.replace("DATA", str(tmp_path / "data")))
    command = [sys.executable, "-m", "experiments.sweep", f"--config={tmp_path / 'config.py'}"]

    def hashes(folder):
        found = sorted((tmp_path / folder / "jobs").glob("*/summary.json"))
        return [json.loads(file.read_text())["param_hash"] for file in found]

    assert subprocess.run([*command, f"--workdir={tmp_path / 'whole'}"]).returncode == 0
    for job in ("001-*", "002-*"):  # killed once in each
        process = subprocess.Popen([*command, f"--workdir={tmp_path / 'broken'}"])
        while not list((tmp_path / "broken").glob(f"jobs/{job}/checkpoints/0000*/*")) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert subprocess.run([*command, f"--workdir={tmp_path / 'broken'}"]).returncode == 0
    assert hashes("broken") == hashes("whole")
    assert len(hashes("whole")) == 2
    resumes = [file.read_text().count('"resume"') for file in (tmp_path / "broken").glob("jobs/*/ledger.jsonl")]
    assert sum(resumes) >= 1, "something was broken off and taken up again"
