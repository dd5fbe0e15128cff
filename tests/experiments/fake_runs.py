"""Run folders as the trainer writes them, without training."""

import json
import math
from pathlib import Path

ENVIRONMENT = {
    "python": "3.11.9",
    "device": "Example CPU (2 cores)",
    "device_count": 1,
    "commit": "0123456789abcdef",
    "dirty": False,
}
TASK = {"name": "listops", "max_length": 128, "min_length": None, "max_depth": 10, "max_args": 10, "data_dir": None,
        "train_examples": 20000, "validation_examples": 2000, "test_examples": 2000, "data_seed": 0}  # fmt: skip


def write(
    root: Path, arg: str, hash: str, seed: int = 0, accuracy: float = 0.4, *, name: str = "", status: str = "done",
    params: int = 200_000, steps: int = 400, speed: float = 12.0, lr: float = 1e-3, environment: dict | None = None,
    content: str = "c0ffee", task: dict | None = None, param_hash: str = "",
) -> Path:  # fmt: skip
    """One run folder; status "unfinished" leaves summary.json out and tears the last line."""
    folder = root / (name or f"{arg}-s{seed}")
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "task": {**TASK, **(task or {})},
        "model": {"topology": "metaformer", "layers": [arg]},
        "optimizer": {"name": "adamw", "lr": lr},
        "train": {"steps": steps, "batch_size": 64, "precision": "fp32"},
    }
    save(folder / "config.json", {"config": config, "hash": hash, "seed": seed, "source": f"configs/quick.py:{arg}"})
    save(folder / "environment.json", {**ENVIRONMENT, **(environment or {})})
    records = []
    for step in range(50, (steps if status == "done" else steps // 2) + 1, 50):
        reached = 0.17 + (accuracy - 0.17) * (1 - math.exp(-4 * step / steps)) + 0.004 * math.sin(step + seed)
        shared = {"step": step, "loss": 2.3 - reached, "accuracy": reached, "seconds": step / speed}
        records += [{**shared, "split": "train", "steps_per_second": speed}, {**shared, "split": "validation"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + ('{"step": 4' if status == "unfinished" else ""))
    seconds = {"setup": 1.5, "compile": 4.0, "data": 0.6, "train": steps / speed, "evaluate": 2.0, "checkpoint": 0.4}
    ledger = [{"event": event, "step": 0, "seconds": value} for event, value in seconds.items()]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    summary = {
        "status": status, "reason": "loss is nan at step 200" if status == "failed" else None, "config_hash": hash,
        "seed": seed, "steps": steps,
        "best": {"step": steps, "loss": 1.5, "accuracy": accuracy, "test": {"accuracy": accuracy}},
        "final": {"validation": {"loss": 1.5, "accuracy": accuracy},
                  "test": {"loss": 1.5, "accuracy": accuracy, "examples": 2000}},
        "params": params, "flops": 130.0 * params, "train_flops": 390.0 * params, "steps_per_second": speed,
        "examples_per_second": 64 * speed, "seconds": {**seconds, "total": sum(seconds.values())}, "peak_bytes": 10**9,
        "device": "Example CPU (2 cores)", "platform": "cpu", "param_hash": param_hash or f"{arg}{seed}",
        "task": {"name": "listops", "content_hash": content, "majority": 0.172, "chance": 0.1},
    }  # fmt: skip
    if status != "unfinished":
        save(folder / "summary.json", summary)
    return folder


def save(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))
