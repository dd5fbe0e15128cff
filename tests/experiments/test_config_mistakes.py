"""Every kind of mistake in a config is refused before anything compiles: exit code 2, one line, the full path."""

import random
import string
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arch import schema
from arch.registry import CHANNEL_MIXERS, MIXERS, NORMS, OPTIMIZERS, POSITIONS, SCHEDULES, Choice
from experiments import cli, config, train
from tests.experiments.shipped import ONE_A_FILE as SOURCES

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(SETTINGS, max_examples=650)
NAMES = {name for r in (MIXERS, CHANNEL_MIXERS, NORMS, POSITIONS, OPTIMIZERS, SCHEDULES) for name in r.names()}
LETTERS = string.ascii_lowercase + "_"


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from leaves(value, here)
        else:
            yield here, value


def sections(tree: Any, path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            here = f"{path}.{key}" if path else key
            yield here
            yield from sections(value, here)


TREES = {source: config.plain(config.configure(source)) for source in SOURCES}
LEAVES = {source: dict(leaves(tree)) for source, tree in TREES.items()}


def option_of(source: str, path: str) -> schema.Option:
    return config._locate(config.plain(TREES[source]), path.split("."))[2]


def edited(word: str, rng: random.Random) -> str:
    """The word after one edit: a letter dropped, added or changed, or two neighbours swapped."""
    i = rng.randrange(len(word))
    kind = rng.choice(["drop", "add", "change", "swap"])
    if kind == "drop" and len(word) > 1:
        return word[:i] + word[i + 1 :]
    if kind == "add":
        return word[:i] + rng.choice(LETTERS) + word[i:]
    if kind == "swap" and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + rng.choice(LETTERS) + word[i + 1 :]


def refusal(argv: list[str], capsys: Any, tmp_path: Any) -> str:
    """Runs the trainer's command line; returns its one line of complaint."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        code = cli.command(train.main)([*argv, f"--workdir={tmp_path / 'run'}"])
    finally:
        jax.monitoring.clear_event_listeners()
    out, err = capsys.readouterr()
    assert code == 2, (argv, out, err)
    assert err.count("\n") == 1, (argv, err)
    assert "Traceback" not in err
    assert not compiled
    assert not (tmp_path / "run").exists()
    return err.strip()


@st.composite
def mistakes(draw: st.DrawFn) -> tuple[list[str], str]:
    """A command line with one mistake, and what its message must start with."""
    source = draw(st.sampled_from(SOURCES))
    path = draw(st.sampled_from(sorted(LEAVES[source])))
    rng = draw(st.randoms(use_true_random=False))
    kind = draw(st.sampled_from(KINDS))
    found = kind(source, path, rng)
    if found is None:  # this kind of mistake cannot be made with that field: misspell it instead
        found = misspelt_key(source, path, rng)
    override, at = found
    return [f"--config={source}", override], at


def misspelt_key(source: str, path: str, rng: random.Random) -> tuple[str, str]:
    keys = path.split(".")
    i = rng.randrange(len(keys))
    siblings = {p.split(".")[i] for p in LEAVES[source] if p.split(".")[:i] == keys[:i] and len(p.split(".")) > i}
    wrong = edited(keys[i], rng)
    while wrong in siblings or not wrong:
        wrong = edited(keys[i], rng)
    at = ".".join([*keys[:i], wrong])
    return f"--config.{'.'.join([at, *keys[i + 1 :]])}=1", f"config.{at}: unknown"


def wrong_type(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    annotation = option_of(source, path).annotation
    texts = ["", "abc", "1.5x", "[1", "{}", "nan", "(1, (2,))", "--"]
    bad = [text for text in texts if config._parse(text, annotation) is None]
    return (f"--config.{path}={rng.choice(bad)}", f"config.{path}: expected") if bad else None


def out_of_range(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    words = schema.describe(option_of(source, path).annotation)
    candidates = {">= 1": "0", ">= 0": "-1", "> 0": "0", "< 1": "1", ">= -1": "-2"}
    bad = [value for bound, value in candidates.items() if bound in words]
    return (f"--config.{path}={rng.choice(bad)}", f"config.{path}: expected") if bad else None


def unknown_component(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    value = LEAVES[source][path]
    if path.rpartition(".")[2] not in ("name", "kind", "topology"):
        return None
    wrong = edited(value, rng)
    while wrong in NAMES:  # "adamw" less its last letter is no mistake
        wrong = edited(value, rng)
    return f"--config.{path}={wrong}", f"config.{path}: unknown"


def whole_section(source: str, path: str, rng: random.Random) -> tuple[str, str]:
    name = rng.choice(sorted(sections(TREES[source])))
    return f"--config.{name}={{'width': 3}}", f"config.{name}: is a section"


def too_deep(source: str, path: str, rng: random.Random) -> tuple[str, str]:
    return f"--config.{path}.more=1", f"config.{path}.more: config.{path} is a single value"


def metaformer(source: str) -> bool:
    """Its layers are one pattern over one depth."""
    return TREES[source]["model"]["topology"] == "metaformer"


def unknown_part(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    if not metaformer(source):
        return None
    name = edited(rng.choice(TREES[source]["model"]["layers"]), rng)
    if name in TREES[source]["model"]["parts"] or not name:
        name = "zzz"
    return f"--config.model.layers={name}", "config.model.layers: unknown part"


def indivisible(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    for name, part in TREES[source]["model"]["parts"].items() if metaformer(source) else ():
        if part.get("num_heads", 1) > 1 and part.get("head_dim") is None:
            width = TREES[source]["model"]["width"] + rng.randrange(1, part["num_heads"])
            return f"--config.model.width={width}", f"config.model.parts.{name}.num_heads: {part['num_heads']} does not"
    return None


def micro_batches(source: str, path: str, rng: random.Random) -> tuple[str, str]:
    return f"--config.optimizer.accumulate={TREES[source]['train']['batch_size'] + rng.randrange(1, 9)}", (
        "config.optimizer.accumulate:"
    )


def long_warmup(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    if TREES[source]["optimizer"]["schedule"]["name"] not in ("cosine", "linear"):
        return None
    warmup = TREES[source]["train"]["steps"] + rng.randrange(100)
    return f"--config.optimizer.schedule.warmup={warmup}", "config.optimizer.schedule.warmup:"


def causal_cls(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    model = TREES[source]["model"]
    if not metaformer(source):
        return None
    able = all("causal" in MIXERS[model["parts"][name]["kind"]].modes for name in model["layers"])
    if model["head"].get("pooling") != "cls" or not able:
        return None
    return "--config.model.causal=true", "config.model.head.pooling:"


def no_layer(source: str, path: str, rng: random.Random) -> tuple[str, str] | None:
    if not metaformer(source):
        return None
    depth = TREES[source]["model"]["depth"] + rng.randrange(5)
    return f"--config.model.layer_overrides=(({depth}, 'mlp'),)", "config.model.layer_overrides: there is no layer"


KINDS = [
    *(misspelt_key, wrong_type, out_of_range, unknown_component, whole_section, too_deep, unknown_part, indivisible),
    *(micro_batches, long_warmup, causal_cls, no_layer),
]


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # jax's own, inside a strategy
@SETTINGS
@given(mistake=mistakes())
@example(mistake=([], "--config: missing"))
@example(mistake=(["--config=configs/quickstrat.py"], "--config: unknown config file"))
@example(mistake=(["--config=configs/quickstart.py:sofmax"], "--config=configs/quickstart.py: unknown name 'sofmax'"))
@example(mistake=(["--config=configs/quickstart.py", "--wrkdir=x"], "command line: unknown flag '--wrkdir'"))
@example(mistake=(["--config=configs/quickstart.py", "--config.seed"], "config.seed: has no value"))
@example(mistake=(["--config=configs/quickstart.py", "--config.=1"], "config.: unknown key"))
@example(
    mistake=(
        ["--config=configs/quickstart.py:linear", "--config.model.embedding.ame=1"],
        "config.model.embedding.ame: unknown",
    )
)
@example(mistake=(["--config=configs/parts.py"], "--config: configs/parts.py has no function get_config"))
def test_mistake_is_refused(mistake: tuple[list[str], str], capsys: Any, tmp_path: Any) -> None:
    argv, start = mistake
    assert refusal(argv, capsys, tmp_path).startswith(start)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@MANY
@given(mistake=mistakes())
def test_many_mistakes_are_refused(mistake: tuple[list[str], str], capsys: Any, tmp_path: Any) -> None:
    argv, start = mistake
    assert refusal(argv, capsys, tmp_path).startswith(start)


@pytest.mark.parametrize("typos", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_right_name_is_suggested(typos: int) -> None:
    """At least 95 % of one-edit typos of keys and component names; of more than 500 a typo each, of 2000 with four."""
    rng, right, total = random.Random(0), 0, 0
    for source in SOURCES:
        for path, value in LEAVES[source].items():
            for _ in range(typos):
                chooses = path.rpartition(".")[2] in ("name", "kind", "topology") and rng.random() < 0.5
                name = value if chooses else path.rpartition(".")[2]
                wrong = edited(name, rng)
                parent = path.rpartition(".")[0]
                overrides = {path: wrong} if chooses else {f"{parent}.{wrong}" if parent else wrong: "1"}
                try:
                    config.configure(source, overrides)
                except config.ConfigError as error:
                    if "unknown" in error.problem:
                        total += 1
                        right += f"did you mean {name!r}?" in error.problem
    assert total > 500 * typos
    assert right / total >= 0.95, f"{right} of {total}"


def test_mistakes_inside_a_config_file() -> None:
    """The same checks hold for what get_config returns: every key misspelt, every required one left out."""
    tree = TREES[SOURCES[0]]
    rng = random.Random(1)
    for path, value in LEAVES[SOURCES[0]].items():
        *parents, key = path.split(".")
        if parents[-1:] == ["parts"]:
            continue
        broken = config.plain(tree)
        node = broken
        for parent in parents:
            node = node[parent]
        wrong = edited(key, rng)
        if wrong in node:
            continue
        node[wrong] = node.pop(key)
        with pytest.raises(config.ConfigError) as caught:
            config.resolve(broken)
        assert str(caught.value).startswith(f"config.{'.'.join([*parents, wrong])}: unknown key") or (
            key in ("name", "kind", "topology") and caught.value.path.startswith(f"config.{'.'.join(parents)}")
        ), (path, value, str(caught.value))


def test_missing_fields_are_named() -> None:
    for path in ("task", "model.head", "optimizer.lr", "train.steps", "model.parts", "model.layers"):
        broken = config.plain(TREES[SOURCES[0]])
        *parents, key = path.split(".")
        node = broken
        for parent in parents:
            node = node[parent]
        del node[key]
        with pytest.raises(config.ConfigError) as caught:
            config.resolve(broken)
        assert caught.value.path.startswith(f"config.{path}"), str(caught.value)


VALID = {
    "seed": st.integers(0, 2**31 - 1),
    "model.norm.name": st.sampled_from(["layer", "rms", "scale"]),
    "model.norm_placement": st.sampled_from(["pre", "post"]),
    "model.positions.name": st.sampled_from(["sinusoid", "learned", "none"]),
    "model.head.pooling": st.sampled_from(["cls", "mean", "last"]),
    "model.dropout": st.floats(0, 0.99),
    "model.depth": st.integers(4, 6),
    "model.parts.mlp.kind": st.sampled_from(["mlp", "swiglu", "geglu"]),
    "model.parts.mlp.hidden": st.one_of(st.none(), st.integers(1, 300)),
    "optimizer.name": st.sampled_from(["adam", "adamw", "lion", "sgd"]),
    "optimizer.schedule.name": st.sampled_from(["constant", "cosine", "rsqrt", "linear"]),
    "optimizer.lr": st.floats(1e-6, 10, exclude_min=True),
    "optimizer.ema": st.one_of(st.none(), st.floats(0, 0.999)),
    "train.precision": st.sampled_from(["fp32", "bf16"]),
    "train.remat": st.sampled_from(["none", "dots", "full"]),
    "train.steps": st.integers(2000, 10**6),
    "train.batch_size": st.integers(1, 512),
    "mesh.fsdp": st.integers(1, 8),
}


# Models for which all of these fit together: no options that hang on each other, as in pyramids and decoders of groups.
PLAIN = [source for source in SOURCES if source.startswith(("configs/lra", "configs/quickstart", "configs/synthetic"))]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(source=st.sampled_from(PLAIN), overrides=st.fixed_dictionaries({}, optional=VALID))
def test_valid_configs_are_accepted(source: str, overrides: dict[str, Any]) -> None:
    """As typed in a shell and as Python values, with the same result."""
    if TREES[source]["model"]["depth"] == 1:
        overrides.pop("model.depth", None)
    if "pooling" not in TREES[source]["model"]["head"]:
        overrides.pop("model.head.pooling", None)
    typed = dict(config.as_flag(path, value)[len("--config.") :].split("=", 1) for path, value in overrides.items())
    a, b = config.configure(source, typed), config.configure(source, overrides)
    assert config.plain(a) == config.plain(b)
    assert config.config_hash(a) == config.config_hash(b)
    for path, value in overrides.items():
        assert dict(leaves(config.plain(a)))[path] == value


def test_hash_names_the_experiment_not_the_run() -> None:
    source = SOURCES[0]
    base = config.config_hash(config.configure(source))
    for path, value in {"seed": 7, "task.data_dir": "/elsewhere", "train.log_every": 3}.items():
        assert config.config_hash(config.configure(source, {path: value})) == base
    for path, value in {"optimizer.lr": 0.123, "model.depth": 5, "task.data_seed": 1}.items():
        assert config.config_hash(config.configure(source, {path: value})) != base


def test_a_choice_keeps_its_key_types() -> None:
    """A changed component takes its own defaults, and what it lacks is dropped with a warning, not in silence."""
    found = config.configure("configs/quickstart.py:softmax", {"model.parts.mixer.kind": "pooling"})
    assert config.plain(found)["model"]["parts"]["mixer"] == {"kind": "pooling", "size": 3}
    assert isinstance(Choice((), "name"), schema.Subtree)
