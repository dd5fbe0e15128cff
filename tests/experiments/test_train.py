"""Whole runs of a tiny model: what the folder holds afterwards, and every way to end."""

import itertools

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from experiments import cli, evaluate, train
from experiments import config as configs
from experiments.checkpoint import Checkpoints, Damaged, param_hash
from experiments.data.store import DataError
from experiments.files import read_json, read_lines
from experiments.program import Program
from tests.experiments import tiny


def run(folder, **overrides):
    return train.train(tiny.config(**overrides), folder, "tiny.py")


def after(program, steps):
    """The state after some steps, from nothing but the step function and the data."""
    state, batches = program.init(), program.batches()
    for _ in range(steps):
        state, _ = program.train_step(state, program.put(next(batches)))
    batches.close()
    return state


def lines(folder, name="metrics"):
    return list(read_lines(folder / f"{name}.jsonl"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, programs_kept):
    """A finished run, for the tests that only look at it."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run(folder, optimizer__ema=0.9) == 0
    return folder


def test_the_folder_tells_everything(done, programs):
    config, environment, summary = (read_json(done / f"{n}.json") for n in ("config", "environment", "summary"))
    assert config["config"]["optimizer"]["b2"] == 0.98  # resolved: a default that nobody wrote
    assert config["hash"] == summary["config_hash"] == configs.config_hash(tiny.config(optimizer__ema=0.9))
    assert environment["packages"]["jax"] == jax.__version__
    assert (summary["status"], summary["steps"], summary["reason"]) == ("done", 24, None)
    assert summary["params"] == programs(tiny.config()).parameters > 0
    assert summary["train_flops"] > 2 * summary["flops"] > 0
    assert summary["peak_bytes"] > 1e7
    assert set(summary["seconds"]) == {*train.SECONDS, "total"}
    assert summary["seconds"]["total"] == pytest.approx(sum(r["seconds"] for r in lines(done, "ledger")), abs=0.01)
    assert all(summary["seconds"][name] >= 0 for name in train.SECONDS)
    assert not list(done.rglob("*.tmp"))


def test_metrics_have_every_step_once(done):
    got = [(r["step"], r["split"]) for r in lines(done)]
    assert [s for s, split in got if split == "train"] == [5, 10, 15, 20, 24]
    assert [s for s, split in got if split == "validation"] == [6, 12, 18, 24]
    assert [s for s, split in got if split == "test"] == [24]
    rows = [r for r in lines(done) if r["split"] == "train"]
    assert rows[0]["learning_rate"] == pytest.approx(3e-3)  # update 5 uses lr(4), the end of warm-up
    assert all(r["seconds"] >= s["seconds"] for s, r in itertools.pairwise(rows))


def test_it_learns(tmp_path):
    assert run(tmp_path, train__steps=60, train__eval_every=60, optimizer__lr=0.01, train__label_smoothing=0.1) == 0
    summary = read_json(tmp_path / "summary.json")
    assert summary["final"]["test"]["accuracy"] > summary["task"]["majority"] + 0.3


def test_the_loop_adds_nothing_to_the_steps(tmp_path, programs):
    assert run(tmp_path) == 0
    want = after(programs(tiny.config()), 24)
    assert read_json(tmp_path / "summary.json")["param_hash"] == param_hash(want["params"])


def test_best_is_the_best_and_evaluate_finds_it(done, capsys):
    summary = read_json(done / "summary.json")
    seen = [r for r in lines(done) if r["split"] == "validation"]
    best = max(seen, key=lambda r: (r["accuracy"], -r["step"]))
    assert (summary["best"]["step"], summary["best"]["accuracy"]) == (best["step"], best["accuracy"])
    for which, step, test in (("best", best["step"], summary["best"]["test"]), ("last", 24, summary["final"]["test"])):
        found = evaluate.evaluate(done, which, "test")
        assert (found["step"], found["accuracy"], found["loss"]) == (step, test["accuracy"], test["loss"])
    assert cli.command(evaluate.main)(["--run", str(done), "--checkpoint", "3"]) == 2
    assert "'3' is not best, last or a step that is kept" in capsys.readouterr().err


def test_param_hash_is_that_of_the_last_checkpoint(done, programs):
    program = programs(tiny.config(optimizer__ema=0.9))
    step, state, _ = Checkpoints(done / "checkpoints").load(program.state)
    assert step == int(state["step"]) == int(state["batch"]) == 24
    assert param_hash(state["params"]) == read_json(done / "summary.json")["param_hash"]
    scored = read_json(done / "summary.json")["final"]["test"]
    assert program.evaluate(state["ema"], "test") == scored  # the averaged parameters are those that count
    assert program.evaluate(state["params"], "test")["loss"] != scored["loss"]


def test_done_before(done, capsys):
    before = (done / "summary.json").read_text()
    assert run(done, optimizer__ema=0.9) == 0
    assert "finished before" in capsys.readouterr().out
    assert (done / "summary.json").read_text() == before


def test_another_config_is_refused(done):
    def main(argv):
        return run(done, optimizer__lr=0.5)

    with pytest.raises(configs.ConfigError, match=r"config\.optimizer\.lr: 0\.003, now 0\.5"):
        main([])
    assert cli.command(main)([]) == 2


def test_second_trainer_is_refused(tmp_path):
    import fcntl

    with open(tmp_path / "train.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(configs.ConfigError, match="another process trains"):
            run(tmp_path)


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(tmp_path / name, seed=seed, train__steps=6) == 0
    a, b, c = (read_json(tmp_path / name / "summary.json")["param_hash"] for name in "abc")
    assert a == b != c


pytestmark = pytest.mark.usefixtures("programs_kept")


@pytest.fixture
def poison(monkeypatch):
    """poison(index, ...): the loss of these batches is not a number."""
    put = Program.batches

    def install(*indices):

        def batches(self, start=0):
            inner = put(self, start)

            class Poisoned:
                at = start

                def __next__(self):
                    batch = next(inner)
                    if self.at in indices:
                        batch["weight"] = batch["weight"] * np.nan
                    self.at += 1
                    return batch

                def __iter__(self):
                    return self

                def close(self):
                    inner.close()

            return Poisoned()

        monkeypatch.setattr(Program, "batches", batches)

    return install


def test_stop_at_a_non_finite_loss(tmp_path, poison, capsys, programs):
    poison(13)
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    assert "step 14: loss nan" in err
    summary = read_json(tmp_path / "summary.json")
    assert (summary["status"], summary["steps"]) == ("failed", 13)
    assert "batch 13" in summary["reason"]
    assert "\n" not in summary["reason"]
    bundle = tmp_path / "replay" / "00000014"
    assert np.isnan(np.load(bundle / "batch.npz")["weight"]).all()
    program = programs(tiny.config())
    step, state, _ = Checkpoints(bundle).load(program.state)
    assert step == int(state["step"]) == 13
    assert param_hash(state["params"]) == param_hash(after(program, 13)["params"])
    assert run(tmp_path) == 1  # it says so again and does not train
    assert "failed before" in capsys.readouterr().err
    (tmp_path / "summary.json").unlink()
    poison()
    assert run(tmp_path) == 0
    assert [r["step"] for r in lines(tmp_path) if r["split"] == "train"] == [5, 10, 15, 20, 24]


def test_skip_goes_on_without_the_batch(tmp_path, poison):
    poison(3, 13)
    assert run(tmp_path, train__on_nonfinite="skip") == 0
    events = [r for r in lines(tmp_path, "ledger") if r["event"] == "nonfinite"]
    assert [(e["step"], e["batch"]) for e in events] == [(4, 3), (14, 13)]
    assert all(r["loss"] is not None and np.isfinite(r["loss"]) for r in lines(tmp_path))
    assert [r["step"] for r in lines(tmp_path) if r["split"] == "train"] == [5, 10, 15, 20, 24]


def test_rollback_goes_round_the_batch(tmp_path, poison, programs):
    """From the checkpoint at 12, with the data behind batch 13: as if batches 12 and 13 were not in the data."""
    poison(13)
    assert run(tmp_path, train__on_nonfinite="rollback") == 0
    program = programs(tiny.config())
    _, state, notes = Checkpoints(tmp_path / "checkpoints").load(program.state)
    assert (int(state["step"]), int(state["batch"]), notes["offset"]) == (24, 26, 2)
    assert [r["step"] for r in lines(tmp_path) if r["split"] == "train"] == [5, 10, 15, 20, 24]
    poison()
    assert run(tmp_path / "other", train__on_nonfinite="rollback") == 0
    assert read_json(tmp_path / "other" / "summary.json")["param_hash"] != param_hash(state["params"])


def test_rollback_gives_up(tmp_path, poison):
    poison(*range(13, 60))
    assert run(tmp_path, train__on_nonfinite="rollback") == 1
    assert read_json(tmp_path / "summary.json")["status"] == "failed"


def test_failed_save_is_told_within_a_step(tmp_path, monkeypatch, capsys):
    fail_to_save(monkeypatch, 8)
    assert run(tmp_path) == 0
    failed = [r for r in lines(tmp_path, "ledger") if r["event"] == "failed_save"]
    assert [r["step"] for r in failed] == [8]
    assert "checkpoint 8 could not be saved: OSError: No space left on device" in capsys.readouterr().err


def scores(monkeypatch, *accuracies):
    """Evaluations in turn find these accuracies."""
    evaluate_split, left = Program.evaluate, iter(accuracies)
    patched = lambda self, *args: {**evaluate_split(self, *args), "accuracy": next(left)}  # noqa: E731
    monkeypatch.setattr(Program, "evaluate", patched)


def fail_to_save(monkeypatch, *steps):
    def write(path, tree, **options):
        if int(path.name) in steps:
            raise OSError("No space left on device")
        ocp.save(path, tree, **options)

    init = Checkpoints.__init__
    monkeypatch.setattr(Checkpoints, "__init__", lambda self, folder, keep: init(self, folder, keep=keep, write=write))


def test_a_best_that_was_not_saved_is_not_the_best(tmp_path, monkeypatch):
    fail_to_save(monkeypatch, 12)
    scores(monkeypatch, 0.5, 0.9, 0.2, 0.3, 0.1, 0.4)
    assert run(tmp_path) == 0
    best = read_json(tmp_path / "summary.json")["best"]
    assert (best["step"], best["accuracy"], best["test"]["accuracy"]) == (6, 0.5, 0.4)


def test_damaged_best_does_not_cost_the_run(tmp_path, monkeypatch, caplog):
    load_step = Checkpoints.load_step

    def broken(self, step, abstract):
        raise Damaged("a bit is wrong")

    monkeypatch.setattr(Checkpoints, "load_step", broken)
    scores(monkeypatch, 0.9, 0.1, 0.2, 0.3, 0.25)  # best at step 6; the last is the test
    assert run(tmp_path) == 0
    summary = read_json(tmp_path / "summary.json")
    assert summary["best"] == {**summary["best"], "step": 6, "accuracy": 0.9, "test": None, "problem": "a bit is wrong"}
    assert "checkpoint 6, the best, cannot be scored" in caplog.text
    assert 6 in Checkpoints(tmp_path / "checkpoints").steps()
    monkeypatch.setattr(Checkpoints, "load_step", load_step)
    assert Checkpoints(tmp_path / "checkpoints").best() == 6


def test_last_save_must_succeed(tmp_path, monkeypatch, capsys):
    fail_to_save(monkeypatch, *range(25))
    assert run(tmp_path) == 1
    assert "step 24 could not be saved" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


def test_a_wrong_config_stops_before_anything_is_compiled(tmp_path):
    for overrides, message in (
        ({"mesh__tensor": 3}, r"config\.mesh: "),
        ({"optimizer__schedule__warmup": 30}, r"config\.optimizer\.schedule\.warmup"),
    ):
        with pytest.raises(configs.ConfigError, match=message):
            run(tmp_path / "x", **overrides)
    assert not (tmp_path / "x").exists()


def test_missing_data_is_said_before_there_is_a_folder(tmp_path, monkeypatch):
    def prepare(self):
        raise DataError("fetch it and put it there")

    monkeypatch.setattr(tiny.Tiny, "prepare", prepare)
    with pytest.raises(DataError, match="fetch it"):  # a Mistake: one line and exit code 2
        run(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_dropout_by_either_generator(programs):
    """rbg gives other dropout than threefry, the same again each time, and the same first parameters."""
    states = {}
    for prng in ("threefry2x32", "rbg"):
        program = programs(tiny.config(model__dropout=0.5, train__prng=prng))
        first = param_hash(program.init()["params"])
        states[prng] = (first, *(param_hash(after(program, 2)["params"]) for _ in range(2)))
    assert states["rbg"][1] == states["rbg"][2]
    assert states["rbg"][0] == states["threefry2x32"][0]
    assert states["rbg"][1] != states["threefry2x32"][1]


def test_bf16_remat_accumulation_and_clip_train(tmp_path):
    options = {"train__precision": "bf16", "train__remat": "full", "optimizer__accumulate": 2, "optimizer__clip": 1.0}
    options["model__parts__mixer__kind"] = "softmax"
    assert run(tmp_path, train__steps=6, **options) == 0
    assert np.isfinite(read_json(tmp_path / "summary.json")["final"]["test"]["loss"])
