"""What get_sweep() may say, and what is refused before anything starts."""

import dataclasses
import sys

import pytest

from arch.errors import ConfigError
from experiments import sweep
from experiments.runs import flatten
from experiments.sweeping import jobs as sweep_jobs

CONFIG = """
from configs import parts

def get_config(mixer: str = "linear"):
    config = parts.base(task="listops", max_length=16, batch_size=4, steps=2)
    config.model = parts.metaformer(width=8, depth=2, mixer={{"kind": mixer, "num_heads": 2}})
    return config

def get_sweep():
    return {sweep}
"""


@pytest.fixture
def config_file(tmp_path):
    def write(sweep: object) -> str:
        (tmp_path / "config.py").write_text(CONFIG.format(sweep=repr(sweep)))
        return str(tmp_path / "config.py")

    return write


def test_jobs_are_resolved_and_their_values_come_back_exactly(config_file):
    values = {"arg": "softmax", "seed": 3, "optimizer.lr": 1 / 3000, "optimizer.clip": None, "train.precision": "bf16",
              "model.layers": ("mixer", "mixer"), "mesh.data": -1}  # fmt: skip
    plain, other = sweep_jobs.read(config_file([{}, values]))
    assert plain.config["train"]["eval_every"] == 500, "defaults are filled in"
    assert (plain.label, plain.seed) == ("default", 0)
    found = flatten(other.config)
    for path, value in list(values.items())[1:]:
        assert found[path] == (list(value) if isinstance(value, tuple) else value), path
    assert other.argv[0].endswith("config.py:softmax")
    assert other.name.startswith("002-softmax-lr0.0003333-")
    assert other.name.endswith(f"-s3-{other.hash}")


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([{}, {"optimizer.lrr": 1.0}], "job 2: config.optimizer.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ([{"optimizer.lr": "high"}], "job 1: config.optimizer.lr: expected"),
        ([{"optimizer.lr": 1e-3}, {"optimizer.lr": -1.0}], "job 2: config.optimizer.lr: "),
        ([{"arg": "softmaxx"}], "did you mean 'softmax'?"),
        ([{"seed": 1}, {"seed": 1, "optimizer.lr": 0.1}, {"seed": 1}], "job 3: the same config and seed as job 1"),
        ([{"model": {"width": 8}}], "config.model: is a section"),
        ([{"train.steps": 7}], "job 1: train.steps: set by get_sweep() and on the command line"),
        ([3], "job 1: overrides: must be a dict"),
        ([], "get_sweep: must return a list of overrides or a search space, not []"),
        ({"space": {}, "trails": 3}, "did you mean 'trials'?"),
        ({"space": {"optimizer.lr": {"low": 1e-3}}, "trials": 3}, 'get_sweep.space.optimizer.lr: must be {"choices"'),
        ({"space": {"optimizer.lr": {"low": 2.0, "high": 1.0}}, "trials": 3}, "get_sweep.space.optimizer.lr: "),
        ({"space": {}, "trials": 0}, "get_sweep.trials: must be a whole number of at least 1, not 0"),
        ({"space": {}, "trials": 1, "sampler": "tpe"}, "get_sweep.sampler: unknown sampler 'tpe'"),
    ],
)
def test_mistakes_name_the_job_and_the_field(config_file, jobs, message):
    with pytest.raises(ConfigError) as caught:
        sweep_jobs.read(config_file(jobs), ["--config.train.steps=2"])
    assert message in str(caught.value)


def test_a_mistake_in_the_last_job_starts_nothing(config_file, tmp_path, capfd):
    file = config_file([*({"seed": seed} for seed in range(3)), {"train.stepz": 3}])
    folder = tmp_path / "sweep"
    with pytest.raises(SystemExit) as ended:
        sweep.run([f"--config={file}", f"--workdir={folder}"], (sys.executable, "-c", "raise SystemExit(9)"))
    assert ended.value.code == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("job 4: config.train.stepz: unknown key 'stepz'; did you mean 'steps'?")
    assert "\n" not in err
    assert not folder.exists()


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_search_space_is_drawn_the_same_every_time(sampler):
    lr, width = {"low": 1e-4, "high": 1e-2, "log": True}, {"low": 8, "high": 64}
    space = {"optimizer.lr": lr, "model.width": width, "arg": {"choices": ("linear", "softmax")}}
    definition = {"space": space, "trials": 8, "seeds": 2, "sampler": sampler, "seed": 5}
    jobs = sweep_jobs.draw(definition)
    assert jobs == sweep_jobs.draw(definition)
    assert jobs != sweep_jobs.draw({**definition, "seed": 6})
    assert [job["seed"] for job in jobs] == [0, 1] * 8
    assert len({job["optimizer.lr"] for job in jobs}) == 8
    assert all(1e-4 <= job["optimizer.lr"] <= 1e-2 and 8 <= job["model.width"] <= 64 for job in jobs)
    assert {job["arg"] for job in jobs} == {"linear", "softmax"}
    assert all(isinstance(job["model.width"], int) for job in jobs)


def test_difference_puts_jobs_that_changed_alike_together(config_file):
    jobs = sweep_jobs.read(config_file([{"seed": 0}, {"seed": 1}, {"seed": 2}]))
    old = sweep_jobs.definition_text(jobs)
    changed = [dataclasses.replace(job, config={**job.config, "extra": 1}) for job in jobs[:2]]
    assert sweep_jobs.difference(old, sweep_jobs.definition_text([*changed, jobs[2]])).splitlines() == [
        "--- jobs 1, 2 in the ledger",
        "+++ jobs 1, 2 now",
        "+config.extra = 1",
    ]
    removed = sweep_jobs.difference(old, sweep_jobs.definition_text(jobs[:2])).splitlines()
    assert removed[0] == "--- job 3 in the ledger"
    assert removed[2] == "-label = default"
