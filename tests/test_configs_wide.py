"""Wide Attention's grid: the sizes that its paper's code gives, and that every config of it builds."""

import math

import pytest

from arch.accounting import account
from arch.errors import ConfigError
from arch.model import functional
from arch.registry import TASKS
from configs.wide import grid
from experiments import config
from experiments.sharding import paths

HEADS = {"imdb_bytes": 48, "imdb_tokens": 48, "listops": 48, "matching": 16}
WIDTH = {"imdb_bytes": 512, "imdb_tokens": 512, "listops": 512, "matching": 128}


def source(name, arg):
    return f"configs/wide/{name}.py:{arg}"


def tree(name, arg):
    return config.plain(config.configure(source(name, arg)))


def millions(name, arg):
    """Parameters of body and head, in millions with three digits, from the parts of the built model."""
    found = tree(name, arg)
    parts = account(found["model"], TASKS.build(found["task"]).spec).parts
    return round(sum(part.params for part in parts if part.name != "embedding") / 1e6, 2)


@pytest.mark.parametrize(
    ("name", "deep", "wide"),
    [("imdb_bytes", 19.96, 9.45), ("listops", 19.97, 9.47), ("matching", 1.05, 0.66)],
)
def test_sizes_are_those_derived_from_the_papers_code(name, deep, wide):
    """20.0M against 9.4M with the classifier's 1.05M, 1.05M against 0.66M with the dual head's 0.26M."""
    first, *_, last = grid.RATIOS[HEADS[name]]
    assert millions(name, f"softmax-{first}") == deep
    assert millions(name, f"softmax-{last}") == wide


def test_words_have_the_same_body_and_a_large_table():
    model = tree("imdb_tokens", "softmax-1x48")["model"]
    assert model == tree("imdb_bytes", "softmax-1x48")["model"]
    spec = TASKS.build(tree("imdb_tokens", "softmax-1x48")["task"]).spec
    assert paths(functional(model, spec).abstract())["embed/embedding"].shape == (93_931, 512)


@pytest.mark.parametrize("name", ["imdb_bytes", "matching"])  # the others have the same models
@pytest.mark.parametrize("attention", grid.ATTENTIONS)
def test_every_aspect_ratio_keeps_the_heads_and_their_size(name, attention):
    for ratio in grid.RATIOS[HEADS[name]]:
        depth, heads = map(int, ratio.split("x"))
        found = tree(name, f"{attention}-{ratio}")  # builds the model from shapes
        mixer = found["model"]["parts"]["mixer"]
        assert depth * heads == HEADS[name]
        assert (found["model"]["depth"], mixer["num_heads"], mixer["kind"]) == (depth, heads, attention)
        assert mixer["head_dim"] == {"imdb_bytes": 64, "matching": 32}[name]
        spec = TASKS.build(found["task"]).spec
        leaves = paths(functional(found["model"], spec).abstract())
        inner = [leaf.shape[0] for path, leaf in leaves.items() if path.endswith("mixer/out/kernel")]
        assert inner == [heads * mixer["head_dim"]] * depth
        hidden = [math.prod(leaf.shape) for path, leaf in leaves.items() if path.endswith("channel/up/kernel")]
        assert hidden == [WIDTH[name] * 4 * WIDTH[name]] * depth, "one feed-forward block a layer, as wide as before"


def test_listops_has_the_same_grid():
    assert grid.names(48) == [job["arg"] for job in config.module("configs/wide/listops.py").get_sweep()[::3]]
    for arg in ("linear-1x48", "sinkhorn-6x8"):
        assert tree("listops", arg)["model"] == tree("imdb_bytes", arg)["model"]
    assert tree("listops", "performer-2x24")["model"]["parts"]["mixer"]["num_features"] == 2


@pytest.mark.parametrize("name", HEADS)
def test_the_sweep_is_the_whole_grid(name):
    module = config.module(f"configs/wide/{name}.py")
    ratios = grid.RATIOS[HEADS[name]]
    jobs = module.get_sweep()
    assert len({(job["arg"], job["seed"]) for job in jobs}) == len(jobs) == 11 * len(ratios) * 3
    assert set(module.GOLDEN) <= {job["arg"] for job in jobs}


def test_training_is_that_of_the_papers_code():
    found = tree("matching", "softmax-4x4")
    assert found["optimizer"]["schedule"] == {"name": "rsqrt", "warmup": 8000}
    assert (found["optimizer"]["lr"], found["optimizer"]["weight_decay"]) == (0.05, 0.1)
    assert (found["train"]["steps"], found["train"]["batch_size"]) == (10_000, 32)
    assert found["model"]["head"]["pooling"] == "first"
    assert tree("matching", "sinkhorn-1x16")["model"]["head"]["pooling"] == "mean"


def test_another_aspect_ratio_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"unknown name 'softmax-4x12'.*softmax-1x48"):
        config.configure(source("imdb_bytes", "softmax-4x12"))
