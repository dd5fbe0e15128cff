"""Continual training: what a run takes over from another, what it refuses, and that it still resumes to the bit."""

import shutil
import signal

import jax
import numpy as np
import pytest

from arch.errors import ConfigError
from experiments import config as configs
from experiments import continual, train
from experiments.checkpoint import Checkpoints, param_hash
from experiments.continual import Request
from experiments.evaluate import evaluate
from experiments.files import read_json, read_lines
from experiments.program import Program
from experiments.sharding import paths
from tests.experiments.test_resume import results, stop_at

pytestmark = pytest.mark.usefixtures("programs_kept")
SHORT, LONG, STEPS = 8, 20, 6
WIDTH, ROWS = 8, "positions/table"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    rng = np.random.default_rng(0)
    file.write_bytes(bytes(rng.choice(list(b"abcd "), 2000).astype(np.uint8)))
    return file


def config(text, length, **overrides):
    tree = {
        "task": {"name": "text_file", "file": str(text), "length": length},
        "model": {
            "topology": "metaformer",
            "width": WIDTH,
            "depth": 1,
            "layers": ("mixer",),
            "channel": None,
            "parts": {"mixer": {"kind": "softmax", "num_heads": 2}},
            "norm": {"name": "layer"},
            "positions": {"name": "learned"},
            "head": {"name": "language_model"},
            "causal": True,
            "dropout": 0.1,
        },
        "optimizer": {"name": "adam", "lr": 5e-2, "schedule": {"name": "cosine", "warmup": 2}, "ema": 0.5},
        "train": {"steps": STEPS, "batch_size": 4, "eval_every": 3, "save_every": 3, "log_every": 2},
        "mesh": {"data": 1},
    }
    configs.apply(tree, {path.replace("__", "."): value for path, value in overrides.items()})
    return configs.resolve(tree)


def leaves(folder, step=None):
    """The state of a checkpoint, by path."""
    saved = read_json(folder / "config.json")
    checkpoints = Checkpoints(folder / "checkpoints")
    state = Program(configs.resolve(saved["config"])).state
    return paths(checkpoints.load_step(checkpoints.latest() if step is None else step, state)[1])


@pytest.fixture(scope="module")
def short(tmp_path_factory, text, programs_kept):
    folder = tmp_path_factory.mktemp("short") / "run"
    assert train.train(config(text, SHORT), folder, "short.py") == 0
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory, text, short):
    folder = tmp_path_factory.mktemp("long") / "run"
    assert train.train(config(text, LONG), folder, "long.py", Request(short)) == 0
    return folder


def begin(text, origin, length=LONG, **overrides):
    program = Program(config(text, length, **overrides))
    with jax.set_mesh(program.mesh):
        return program, continual.start(program, continual.find(program, origin))


def test_everything_but_the_schedule_goes_on(text, short):
    """Parameters, moments, their count and averages are the origin's; step, data and random numbers start afresh."""
    program, state = begin(text, Request(short))
    old, new, fresh = leaves(short), paths(state), paths(program.init())
    assert {path.split("/")[0] for path in new} == {path.split("/")[0] for path in fresh}
    for path, leaf in new.items():
        if path.split("/")[0] in ("step", "batch", "rng", "halted"):
            np.testing.assert_array_equal(leaf, fresh[path], err_msg=path)
        elif not path.endswith(ROWS):
            np.testing.assert_array_equal(leaf, old[path], err_msg=path)
    assert int(state["step"]) == 0
    counts = [int(leaf) for path, leaf in new.items() if path.startswith("opt") and path.endswith("count")]
    assert counts == [STEPS]


def test_new_places_repeat_the_table(text, short):
    _, state = begin(text, Request(short))
    old, tables = leaves(short), {path: leaf for path, leaf in paths(state).items() if path.endswith(ROWS)}
    assert len(tables) == 4  # of the parameters, their average and both moments
    for path, table in tables.items():
        assert table.shape == (LONG, WIDTH)
        for place in range(LONG):
            np.testing.assert_array_equal(table[place], old[path][place % SHORT], err_msg=f"{path} {place}")
        assert np.any(np.asarray(table))


def test_the_row_of_a_cls_token_is_not_repeated(text, short):
    class Task:
        spec = Program(config(text, LONG)).task.spec

    class Fake:
        task, state = Task, {"params": {"table": jax.ShapeDtypeStruct((LONG + 1, 1), np.float32, sharding=None)}}

    old = {"table": np.arange(SHORT + 1, dtype=np.float32)[:, None]}
    rows = np.asarray(continual._extended(Fake, old, "params")["table"])[:, 0]
    np.testing.assert_array_equal(rows, [0, *(1 + np.arange(LONG) % SHORT)])


def test_optimizer_state_by_choice(text, short):
    program, state = begin(text, Request(short, optimizer=False))
    fresh = paths(program.init())
    for path, leaf in paths(state).items():
        if path.startswith("opt"):
            np.testing.assert_array_equal(leaf, fresh[path])
    for path, leaf in paths(state["params"]).items():
        np.testing.assert_array_equal(paths(state["ema"])[path], leaf)  # averaged from here on
    _, other = begin(text, Request(short, optimizer=False), optimizer__name="lion")
    assert param_hash(other["params"]) == param_hash(state["params"])


def test_origin_is_in_the_run_and_its_hash(text, short, long):
    saved, summary, source = (
        read_json(f / n) for f, n in ((long, "config.json"), (long, "summary.json"), (short, "summary.json"))
    )
    assert saved["init"] == summary["init"] == {
        "run": str(short.resolve()), "asked": "last", "optimizer": True, "step": STEPS,
        "config_hash": source["config_hash"], "seed": 0, "param_hash": source["param_hash"],
    }  # fmt: skip
    plain = configs.config_hash(config(text, LONG))
    assert summary["config_hash"] == saved["hash"] != plain
    assert source["init"] is None


def test_seeds_are_one_cell_and_other_origins_are_not():
    record = {
        "config_hash": "a",
        "step": 6,
        "asked": "last",
        "optimizer": True,
        "seed": 0,
        "param_hash": "x",
        "run": "r",
    }
    mine = continual.run_hash("c", record)
    assert mine == continual.run_hash("c", {**record, "seed": 1, "param_hash": "y", "run": "s"})
    others = [{"config_hash": "b"}, {"step": 3}, {"asked": "best"}, {"optimizer": False}]
    hashes = {mine, "c", *(continual.run_hash("c", {**record, **other}) for other in others)}
    assert len(hashes) == 6
    best = {**record, "asked": "best"}  # each seed has its own best step
    assert continual.run_hash("c", best) == continual.run_hash("c", {**best, "step": 3})
    assert continual.run_hash("c", None) == "c"


def test_it_starts_where_the_other_ended(short, long):
    """Its first losses are well below those of a fresh model."""
    first = read_lines(long / "metrics.jsonl")
    loss = next(line["loss"] for line in first if line["split"] == "train")
    untrained = next(line["loss"] for line in read_lines(short / "metrics.jsonl") if line["split"] == "train")
    assert loss < untrained - 0.3


@pytest.mark.parametrize("batch", [2, 5])  # before the first checkpoint, and after it
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, text, short, long, batch):
    folder = tmp_path / "run"
    stop_at(monkeypatch, batch)
    assert train.train(config(text, LONG), folder, "long.py", Request(short)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert train.train(config(text, LONG), folder, "long.py", Request(short)) == 0
    assert results(folder) == results(long)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch, text, short, long):
    """And one with a checkpoint of its own does not need its origin any more."""
    origin, folder = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(short, origin)

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(train, "restore", kill)
    with pytest.raises(Killed):
        train.train(config(text, LONG), folder, "long.py", Request(origin))
    monkeypatch.undo()
    assert not Checkpoints(folder / "checkpoints").steps()
    shutil.move(origin, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"--init_from: step 6 of .*origin cannot be read"):
        train.train(config(text, LONG), folder, "long.py", Request(origin))
    shutil.move(tmp_path / "elsewhere", origin)
    stop_at(monkeypatch, 5)
    assert train.train(config(text, LONG), folder, "long.py", Request(origin)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    shutil.rmtree(origin)
    assert train.train(config(text, LONG), folder, "long.py", Request(origin)) == 0
    assert results(folder)["param_hash"] == results(long)["param_hash"]


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_origin(tmp_path, monkeypatch, text, short, long):
    from experiments.data import pipeline

    batches, began = pipeline.train_batches, []

    def poisoned(task, **options):
        for i, batch in enumerate(batches(task, **options), start=options["start_step"]):
            yield {**batch, "weight": batch["weight"] * (np.nan if i == 1 else 1)}

    def start(*args):
        began.append(args)
        return begin_from(*args)

    begin_from = continual.start
    monkeypatch.setattr(pipeline, "train_batches", poisoned)
    monkeypatch.setattr(continual, "start", start)
    changed = config(text, LONG, train__on_nonfinite="rollback")
    assert train.train(changed, tmp_path / "run", "long.py", Request(short)) == 0
    assert len(began) == 2


def test_another_origin_is_another_experiment(text, short, long):
    for asked in (None, Request(short, step="3"), Request(short, optimizer=False), Request(long)):
        with pytest.raises(ConfigError, match=r"--init_from: .*began from .*--init_optimizer=true, or name another"):
            train.train(config(text, LONG), long, "long.py", asked)
    with pytest.raises(ConfigError, match="began from fresh parameters; leave --init_from out"):
        train.train(config(text, SHORT), short, "short.py", Request(long))
    assert train.train(config(text, LONG), long, "long.py", Request(short)) == 0  # finished before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__width": 16}, r"params/embed.* is \(257, 8\) .* and \(257, 16\) in this config"),
        ({"model__depth": 2}, r"params/topology/blocks/1/mix.* is absent in .*; these must agree"),
        ({"model__positions.name": "none"}, r"params/positions/table is \(8, 8\) in .* and absent in this config"),
        ({"task__length": 4}, r"params/positions/table is \(8, 8\) .* and \(4, 8\).*only a table .* can grow"),
        ({"optimizer__name": "lion"}, r"opt/.* take the same optimizer, or --init_optimizer=false"),
    ],
)
def test_the_first_path_that_differs_is_named(tmp_path, text, short, overrides, message):
    with pytest.raises(ConfigError, match="--init_from: " + message):
        train.train(config(text, LONG, **overrides), tmp_path / "run", "long.py", Request(short))
    assert not (tmp_path / "run").exists()


def test_steps_are_chosen_by_name(text, short):
    program = Program(config(text, SHORT))
    best = Checkpoints(short / "checkpoints").best()
    for asked, step in (("3", 3), ("last", STEPS), ("best", best)):
        record = continual.find(program, Request(short, step=asked))
        assert record["step"] == step
        assert record["param_hash"] == param_hash(
            {path[7:]: leaf for path, leaf in leaves(short, step).items() if path.startswith("params/")}
        )
    with pytest.raises(ConfigError, match=r"--init_step: '5' is not best, last or a step that is kept \(kept: 3, 6\)"):
        continual.find(program, Request(short, step="5"))
    with pytest.raises(ConfigError, match=r"--init_from: .*nowhere has no config\.json"):
        continual.find(program, Request(short / "nowhere"))


def test_an_origin_that_changed_is_noticed(text, short):
    program = Program(config(text, SHORT))
    record = {**continual.find(program, Request(short)), "param_hash": "0" * 64}
    with pytest.raises(ConfigError, match=r"--init_from: step 6 of .* was 000000000000 when this run began"):
        continual.start(program, record)


def test_flags(short):
    class Flags:
        init_from, init_step, init_optimizer = None, None, "false"

    with pytest.raises(ConfigError, match=r"--init_optimizer: .*name it with --init_from=RUN"):
        continual.request(Flags)
    Flags.init_from = short
    assert continual.request(Flags) == Request(short, "last", False)
    Flags.init_step, Flags.init_optimizer = "best", None
    assert continual.request(Flags) == Request(short, "best", True)


def test_longer_runs_can_be_scored(long):
    assert evaluate(long, "last", "test")["step"] == STEPS
