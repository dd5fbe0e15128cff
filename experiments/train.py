"""Trains one config in one folder, from the start or from where it was stopped.

    python -m experiments.train --config=configs/quickstart.py:linear --workdir=runs/linear
    python -m experiments.train --config=... --init_from=runs/short --workdir=runs/long      # see continual.py

The same command resumes: the data order and every random number are functions of (seed, step), so a run that was killed
ends with the same bits as one that was not. Exit codes: 0 done (also when it was done before), 1 failed, 2 a mistake in
the config, 130 (Ctrl-C) or 143 (SIGTERM) stopped after saving the step it was at.
"""

import collections
import fcntl
import json
import logging
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arch import accounting
from arch.errors import ConfigError
from experiments import cli, continual, environment
from experiments import config as configs
from experiments.checkpoint import Checkpoints, Damaged, param_hash
from experiments.data.store import DataError
from experiments.data.task import note
from experiments.files import read_json, write_json
from experiments.metrics import Ledger, Metrics, Progress, Stopwatch, Window
from experiments.program import AHEAD, Program
from experiments.signals import Stopping
from experiments.step import metrics_of

log = logging.getLogger("archloom")
SECONDS = ("setup", "compile", "train", "data", "evaluate", "checkpoint")
BUNDLES = 8  # of non-finite steps kept
ROLLBACKS = 3  # from one checkpoint, before the run gives up


class Failed(Exception):
    """The run cannot go on; the message is the reason."""


def train(config: Any, workdir: Path, source: str, init: continual.Request | None = None) -> int:
    """Trains to the end or to a signal; returns the exit code. `init`: the run to start from."""
    started = time.perf_counter()
    program = Program(config)
    origin = None
    if not (workdir / "config.json").exists():
        program.task.prepare()  # data that is missing is said before there is a folder
        origin = None if init is None else continual.find(program, init)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "train.lock", "w") as lock, Stopping() as stopping:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "--workdir", f"another process trains in {workdir}; wait for it or name another"
            ) from None
        if (code := claim(config, workdir, source, init, origin)) is not None:
            return code
        environment.compile_cache()
        with jax.set_mesh(program.mesh), Progress(program.steps) as progress:
            try:
                return run(program, workdir, stopping, progress, started)
            except (Failed, DataError) as failure:
                print(f"{workdir}: {failure}", file=sys.stderr)
                return 1


def claim(
    config: Any,
    workdir: Path,
    source: str,
    init: continual.Request | None = None,
    origin: continual.Record | None = None,
) -> int | None:
    """Makes the folder this config's, or checks that it is. An exit code if there is nothing left to do."""
    file, summary = workdir / "config.json", workdir / "summary.json"
    saved = read_json(file) if file.exists() else None
    origin = origin if saved is None else saved.get("init")
    hashed = continual.run_hash(configs.config_hash(config), origin)
    mine = {"config": configs.plain(config), "hash": hashed, "seed": config["seed"]}
    if saved is None:
        write_json(file, {**mine, "source": source, **({} if origin is None else {"init": origin})}, indent=1)
        return None
    continual.check_asked(workdir, origin, init)
    if (saved["hash"], saved["seed"]) != (mine["hash"], mine["seed"]):
        changes = "; ".join(differences(saved["config"], json.loads(json.dumps(mine["config"]))))
        raise ConfigError("--workdir", f"{workdir} holds another experiment: {changes}; name another folder")
    if not summary.exists():
        return None
    found = read_json(summary)
    if found["status"] == "done":
        print(f"{workdir}: finished before, {found['steps']} steps; nothing to do")
        return 0
    print(
        f"{workdir}: failed before: {found['reason']}; delete {summary} to go on from its checkpoint", file=sys.stderr
    )
    return 1


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """The leaves that differ, as "config.a.b: 1, now 2"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path}: {old!r}, now {new!r}"]


def run(program: Program, workdir: Path, stopping: Stopping, progress: Progress, started: float) -> int:
    """The loop. `step` counts the updates that were started; `running` holds those whose metrics are not yet read."""
    settings, task, steps = program.config["train"], program.task, program.steps
    objective, names = program.objective, metrics_of(program.objective)
    means = (*objective.metrics, "grad_norm")
    task.prepare()
    write_json(workdir / "environment.json", environment.describe(), indent=1)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings["keep"])
    checkpoints.sweep()
    init = read_json(workdir / "config.json").get("init")
    ledger = Ledger(workdir)
    ledger.write("setup", 0, time.perf_counter() - started)
    with ledger.timed("compile", 0):
        train_step, _ = program.train_step, program.eval_step

    state, step, notes = restore(program, checkpoints, ledger, init)
    batches = program.batches(int(state["batch"]))
    metrics, watch, window = Metrics(workdir, step), Stopwatch(ledger, notes["seconds"]), Window(notes["window"], means)
    saved, best_before = step, notes["best"]
    rollbacks: collections.Counter[int] = collections.Counter()
    running: collections.deque[tuple[int, Any]] = collections.deque()
    while True:
        evaluate = step > 0 and (step % settings["eval_every"] == 0 or step == steps) and notes["evaluated"] != step
        stop = step == steps or stopping()
        save = stop or step % settings["save_every"] == 0
        pause = evaluate or save or stop

        bad = None
        while len(running) > (0 if pause else AHEAD) and bad is None:  # reads what the device finished some steps ago
            at, values = running.popleft()
            row = dict(zip(names, np.asarray(values).tolist()))
            bad = at if not row["ok"] else None
            window.add(row)
            if at % settings["log_every"] == 0 or at == steps:
                line = window.line(row, watch.total, program.batch_size)
                metrics.write(at, "train", **line)
                progress.update(at, line)
        if bad is not None:
            what = f"step {bad}: loss {row['loss']}, gradient norm {row['grad_norm']}; the parameters are untouched"
            batch_index = bad - 1 + notes["offset"]
            bundle = replay(program, workdir, state, bad, batch_index, row)
            ledger.write("nonfinite", bad, action=settings["on_nonfinite"], batch=batch_index)
            progress.say(f"{what}; {settings['on_nonfinite']}; see {bundle}")
            if settings["on_nonfinite"] == "skip":
                continue
            checkpoints.wait()
            watch.pause(bad)
            origin = checkpoints.latest() or 0
            rollbacks[origin] += 1
            if settings["on_nonfinite"] == "stop" or rollbacks[origin] > ROLLBACKS:
                advice = "lower optimizer.lr, set optimizer.clip or train.on_nonfinite"
                reason = f"{what}; batch {batch_index} and the state are in {bundle}; {advice}"
                write_json(
                    workdir / "summary.json", summary(program, workdir, "failed", reason, bad - 1, ledger), indent=1
                )
                raise Failed(reason)
            running.clear()
            metrics.close()
            batches.close()
            state, step, notes = restore(program, checkpoints, ledger, init)
            notes["offset"] = batch_index + 1 - step  # the data goes on behind the batch that did it
            state = {**state, "batch": jax.device_put(np.int32(batch_index + 1), program.replicated)}
            batches, metrics = program.batches(batch_index + 1), Metrics(workdir, step)
            window = Window(notes["window"], means)
            watch, saved = Stopwatch(ledger, notes["seconds"]), step
            continue
        if failure := checkpoints.poll():
            failed_save(failure, progress, ledger)
            if notes["best"] and notes["best"]["step"] == failure[0]:
                notes["best"] = best_before  # the best is one that can be loaded
        if pause:
            jax.block_until_ready(state)
            watch.pause(step)
        if evaluate:
            with ledger.timed("evaluate", step, split="validation"):
                found = program.evaluate(state[program.evaluated], "validation", stopping)
            if found is not None:
                notes["evaluated"], notes["last"] = step, found
                metrics.write(step, "validation", seconds=round(watch.total, 3), **found)
                told = scored(found, task.majority("validation"))
                progress.say(f"step {step}/{steps}  validation {told}{note(task, '  ({})')}")
                if notes["best"] is None or objective.rank(found) > objective.rank(notes["best"]):
                    best_before, notes["best"], save = notes["best"], {"step": step, **found}, True
            stop = stop or stopping()
        if (save or stop) and step > saved:
            with ledger.timed("checkpoint", step):
                checkpoints.save(step, state, {**notes, "window": window.state, "seconds": watch.total})
            saved = step
        if stop:
            break

        with watch.waiting():
            batch = next(batches)
        state, values = train_step(state, program.put(batch))
        step += 1
        running.append((step, values))

    with ledger.timed("checkpoint", step):
        checkpoints.wait()
    if failure := checkpoints.poll():
        failed_save(failure, progress, ledger)
        raise Failed(f"step {failure[0]} could not be saved: {failure[1]}; mend that and start again")
    scores = None
    if not stopping():
        with ledger.timed("evaluate", step, split="test"):
            scores = score_test(program, checkpoints, state, notes["best"], stopping)
    if scores is not None:
        metrics.write(step, "test", seconds=round(watch.total, 3), **scores[0])
    progress.close()
    metrics.close()
    batches.close()
    ledger.write("done" if scores else "stop", step)
    if scores is None:
        print(f"{workdir}: stopped at step {step} of {steps}, saved; the same command goes on from there")
        return 128 + (stopping.signal or 0)
    test, best = scores
    rate = step / watch.total
    result = summary(program, workdir, "done", None, step, ledger) | {
        "best": best,
        "final": {"validation": notes["last"], "test": test},
        "param_hash": param_hash(state["params"]),
        "steps_per_second": rate,
        "examples_per_second": rate * program.batch_size,
    }
    write_json(workdir / "summary.json", result, indent=1)
    at_best = f"{best['test'][objective.judged_by]:.4f}" if best["test"] else "unknown"
    print(
        f"{workdir}: done, {step} steps; test {scored(test, task.majority('test'), only=objective.judged_by)},", end=" "
    )
    print(f"{at_best} at the best validation step {best['step']}{note(task, ' ({})')}")
    return 0


def scored(scores: Mapping[str, float], majority: float, only: str | None = None) -> str:
    """Scores in words, an accuracy beside the majority-class level."""
    level = {"accuracy": f" (majority {majority:.4f})"}
    shown = [name for name in ("accuracy", "loss") if name in scores and only in (None, name)]
    return "  ".join(f"{name} {scores[name]:.4f}{level.get(name, '')}" for name in shown)


def restore(
    program: Program, checkpoints: Checkpoints, ledger: Ledger, origin: continual.Record | None = None
) -> tuple[Any, int, dict[str, Any]]:
    """(state, step, notes) of the newest intact checkpoint, or the beginning. Damaged steps after it are deleted."""
    start = time.perf_counter()
    found = checkpoints.load(program.state)
    step = found[0] if found is not None else 0
    for later in checkpoints.steps():
        if later > step:
            checkpoints.delete(later)
    if found is not None:
        ledger.write("resume", step, time.perf_counter() - start)
        log.info("going on from step %d", step)
        return found[1], step, found[2]
    state = jax.block_until_ready(program.init() if origin is None else continual.start(program, origin))
    ledger.write("setup", 0, time.perf_counter() - start, what="parameters")
    # best, last: the best and the newest validation; offset: batches passed over by rollbacks; window: see metrics
    return state, 0, {"seconds": 0.0, "evaluated": 0, "best": None, "last": None, "offset": 0, "window": None}


def replay(program: Program, workdir: Path, state: Any, step: int, batch_index: int, row: Mapping[str, float]) -> Path:
    """Keeps what shows a non-finite step again: its batch and, where the run halts there, the state before it."""
    folder = workdir / "replay" / f"{step:08d}"
    if len(list(folder.parent.glob("*"))) >= BUNDLES:
        return folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    batches = program.batches(batch_index)
    np.savez(folder / "batch.npz", **next(batches))
    batches.close()
    write_json(
        folder / "info.json", {"step": step, "batch": batch_index, **{k: str(v) for k, v in row.items()}}, indent=1
    )
    if "halted" in state:
        kept = Checkpoints(folder, keep=1)
        kept.save(step - 1, state, {})
        kept.wait()
    return folder


def failed_save(failure: tuple[int, BaseException], progress: Progress, ledger: Ledger) -> None:
    step, error = failure
    progress.say(f"checkpoint {step} could not be saved: {type(error).__name__}: {error}")
    ledger.write("failed_save", step, reason=f"{type(error).__name__}: {error}")


def score_test(
    program: Program, checkpoints: Checkpoints, state: Any, best: dict[str, Any], stopping: Stopping
) -> tuple[dict[str, float], dict[str, Any]] | None:
    """The test split with the final parameters, and `best` with that of the best validation step. None if stopped."""
    name = program.evaluated
    final = at_best = program.evaluate(state[name], "test", stopping)
    if best["step"] != int(state["step"]):
        try:
            _, found, _ = checkpoints.load_step(best["step"], {name: program.state[name]})
        except Damaged as error:
            log.warning("checkpoint %d, the best, cannot be scored on the test split: %s", best["step"], error)
            return (final, {**best, "test": None, "problem": str(error)}) if final else None
        at_best = program.evaluate(found[name], "test", stopping)
    return (final, {**best, "test": at_best}) if final and at_best else None


def summary(
    program: Program, workdir: Path, status: str, reason: str | None, step: int, ledger: Ledger
) -> dict[str, Any]:
    """What summary.json says of every run, however it ended. Seconds are those of all attempts."""
    saved, task, remat = read_json(workdir / "config.json"), program.task, program.config["train"]["remat"]
    account = accounting.account(program.config["model"], task.spec, remat=remat)
    seconds = {name: round(ledger.totals.get(name, 0.0), 3) for name in SECONDS}
    accurate = "accuracy" in program.objective.metrics
    levels = {"majority": task.majority("test"), "chance": task.chance} if accurate else {}
    return {
        "status": status,
        "reason": reason,
        "config_hash": saved["hash"],
        "seed": saved["seed"],
        "source": saved["source"],
        "init": saved.get("init"),  # the run it started from
        "steps": step,
        "params": program.parameters,
        "flops": account.flops,
        "train_flops": account.train_flops,
        "seconds": {**seconds, "total": round(sum(ledger.totals.values()), 3)},
        "peak_bytes": environment.peak_bytes(),
        "device": environment.device(),
        "platform": jax.default_backend(),
        "task": {
            "name": program.config["task"]["name"],
            "content_hash": task.content_hash,
            **levels,
            **({"note": note(task)} if note(task) else {}),
        },
    }


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="experiments.train", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--init_from", type=Path, metavar="RUN", help="start from this run's checkpoint")
    parser.add_argument("--init_step", metavar="STEP", help="which: last (default), best or a step")
    parser.add_argument("--init_optimizer", choices=("true", "false"), help="take over its moments (default) or not")
    loaded = configs.load(argv, parser)
    return train(loaded.config, loaded.flags.workdir, loaded.source, continual.request(loaded.flags))


if __name__ == "__main__":
    environment.quiet()
    environment.keep_memory()
    sys.exit(cli.command(main)(None))
