"""From a config file and the command line to one checked, resolved experiment.

    python -m experiments.train --config=configs/listops.py:linear --config.optimizer.lr=1e-3 --workdir=runs/a

A config file has `get_config(arg)`, plain data in a ConfigDict. Overrides are applied first, then every leaf is checked
against the constructor it feeds and the defaults are filled in, then the model is built from shapes alone. A mistake is
a ConfigError, one line with the full path; cli.command turns it into exit code 2.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import logging
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_collections

from arch import model, schema
from arch.errors import ConfigError, join, unknown, within
from arch.registry import HEADS, OBJECTIVES, OPTIMIZERS, TASKS, TOPOLOGIES, Choice, Section
from arch.schema import NonNegative, Positive, Rate
from experiments import data, diffusion, objectives, optim  # noqa: F401  importing these fills their registries
from experiments.cli import Parser

log = logging.getLogger("archloom")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run: how long, how often, in which precision. `*_every` are in steps."""

    steps: Positive
    batch_size: Positive
    eval_batch_size: Positive | None = None  # None: batch_size
    eval_every: Positive = 500
    save_every: Positive = 500
    log_every: Positive = 50
    keep: Positive = 2  # newest checkpoints kept beside the best one
    precision: Literal["fp32", "bf16"] = "fp32"  # of activations; parameters and sums are float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    label_smoothing: Rate = 0.0
    prng: Literal["threefry2x32", "rbg"] = "threefry2x32"  # dropout; rbg: compiles fast on TPU, bits vary by device


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; -1 takes what is left."""

    data: Annotated[int, schema.Range(low=-1)] = -1
    fsdp: Annotated[int, schema.Range(low=-1)] = 1
    tensor: Annotated[int, schema.Range(low=-1)] = 1
    sequence: Annotated[int, schema.Range(low=-1)] = 1


Axes = tuple[str | tuple[str, ...] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The fields every config has."""

    seed: NonNegative = 0
    task: Annotated[Mapping, Choice((TASKS,))]
    objective: Annotated[Mapping, Choice((OBJECTIVES,), default="classify")]
    model: Annotated[Mapping, Choice((TOPOLOGIES,), key="topology", shared=model.Options)]
    optimizer: Annotated[Mapping, Choice((OPTIMIZERS,), shared=optim.Shared)]
    train: Annotated[Mapping, Section(Train)]
    mesh: Annotated[Mapping, Section(Mesh)]
    sharding: tuple[tuple[str, Axes], ...] = ()  # (path regex, mesh axes of each dimension); empty: the defaults


# What does not change the result: where data lies, how often things are written or shown. Of a folder with files to
# read instead of the generated ones only counts that it is given: the run records the hash of what it read.
NOT_IDENTITY = ("seed", "task.data_dir", "train.save_every", "train.log_every", "train.keep")

# Options added since runs were first kept, with what they were when they came: left out of the hash where they are that
# still, so that an older run of the same experiment keeps its name. Add to this list with every new option.
ADDED: tuple[tuple[str, Any], ...] = (
    ("objective", {"name": "classify"}),
    ("model.embedding", {"name": "tokens"}),
    ("model.read", "all"),
    ("model.parallel", False),
    ("model.layer_scale", None),
    ("model.drop_path", 0.0),
    ("model.loops", 1),
    ("model.scan", False),
    ("model.parts.*.heads_at_once", None),
)


@dataclass(frozen=True)
class Loaded:
    config: ml_collections.ConfigDict  # resolved and locked
    source: str  # "configs/listops.py:linear"
    overrides: Mapping[str, Any]
    flags: argparse.Namespace  # everything that is not --config


def load(argv: Sequence[str], parser: argparse.ArgumentParser | None = None, *, required: bool = True) -> Loaded:
    """Reads --config=FILE[:ARG], --config.path=value and the parser's own flags; checks everything."""
    source, overrides, flags = split(argv, parser or Parser(), required=required)
    return Loaded(configure(source, overrides), source, overrides, flags)


def split(
    argv: Sequence[str], parser: argparse.ArgumentParser, *, required: bool = True
) -> tuple[str, dict[str, str], argparse.Namespace]:
    """The command line as (source, overrides as text, the parser's flags)."""
    rest, overrides, source = [], {}, ""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not (word == "--config" or word.startswith(("--config=", "--config."))):
            rest.append(word)
            continue
        name, equals, value = word.partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(name[2:], "has no value; write --config.path=value")
            value = words.pop(0)
        if name == "--config":
            source = value
        else:
            overrides[name.removeprefix("--config.")] = value
    flags, stray = parser.parse_known_args(rest)
    for word in stray:
        known = [option for action in parser._actions for option in action.option_strings]
        raise unknown("command line", word.split("=")[0], [*known, "--config"], "flag")
    if required and not source:
        raise ConfigError("--config", "missing; name a config file, such as --config=configs/quickstart.py:softmax")
    return source, overrides, flags


def configure(source: str, overrides: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """The checked config of FILE[:ARG] with overrides; their values are Python values or text as typed in a shell."""
    tree = read(source)
    apply(tree, overrides or {})
    return resolve(tree)


def config_file(path: str) -> Path:
    """A config file as given, or the one of that name that is installed with the package."""
    installed = Path(__file__).resolve().parent.parent / path
    found = next((p for p in (Path(path), installed) if p.is_file()), None)
    if found is None:
        folder = Path(path).parent if Path(path).parent.is_dir() else installed.parent
        names = [str(Path(path).parent / p.name) for p in folder.glob("*.py")] if folder.is_dir() else []
        raise unknown("--config", path, names, "config file")
    return found


def module(path: str) -> types.ModuleType:
    """The config file, imported."""
    file = config_file(path)
    spec = importlib.util.spec_from_file_location(f"archloom_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError("--config", f"{path} is not a Python file")
    found = importlib.util.module_from_spec(spec)
    _run(path, spec.loader.exec_module, found)
    return found


def read(source: str) -> dict[str, Any]:
    """What get_config(ARG) returns, as nested dicts."""
    path, _, arg = source.partition(":")
    get_config = getattr(module(path), "get_config", None)
    if get_config is None:
        raise ConfigError("--config", f"{path} has no function get_config")
    found = _run(path, get_config, *([arg] if arg else []))
    if not isinstance(found, Mapping | ml_collections.ConfigDict):
        raise ConfigError("--config", f"get_config in {path} returned {type(found).__name__}, not a ConfigDict")
    return plain(found)


def _run(path: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ConfigError:
        raise
    except Exception as error:
        names = getattr(error, "names", None)
        if names is not None:  # a name looked up in one of the tables of configs/parts.py
            raise unknown(f"--config={path}", error.args[0], names, "name") from error
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
        line = f":{where[-1].lineno}" if where else ""
        raise ConfigError("--config", f"{path}{line} failed: {type(error).__name__}: {error}") from error


def plain(tree: Any) -> Any:
    """ConfigDicts as dicts, lists as tuples."""
    if isinstance(tree, Mapping | ml_collections.ConfigDict):
        return {key: plain(tree[key]) for key in tree}
    if isinstance(tree, list | tuple):
        return tuple(plain(item) for item in tree)
    return tree


def apply(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Sets the overrides in the tree. A changed component comes first; options it lacks go, with a warning."""
    chooses = [path for path in overrides if path.rpartition(".")[2] in ("name", "kind", "topology")]
    for path in sorted(overrides, key=lambda path: (path not in chooses, path.count("."))):
        node, key, option, siblings = _locate(tree, path.split("."))
        value = overrides[path]
        node[key] = parse(value, option.annotation, join("config", path)) if isinstance(value, str) else value
        if path in chooses and siblings is not None:
            _drop_stale(node, siblings, path)


def _locate(tree: dict[str, Any], keys: list[str]) -> tuple[dict[str, Any], str, schema.Option, Any]:
    known, node, nested = schema.options(Experiment), tree, None
    for depth, key in enumerate(keys):
        here = ".".join(["config", *keys[: depth + 1]])
        chooser = isinstance(nested, Choice) and key == nested.key
        if key not in known and not chooser:
            raise unknown(here, key, known, "key")
        option = schema.Option(key, str) if chooser else known[key]
        inner = schema.subtree(option.annotation)
        if depth == len(keys) - 1:
            if inner is not None:
                raise ConfigError(here, f"is a section; override its fields one by one, as in --{here}.FIELD=VALUE")
            return node, key, option, nested
        if inner is None:
            raise ConfigError(join("config", *keys), f"{here} is a single value and has no fields")
        node = node.setdefault(key, dict(option.default) if isinstance(option.default, Mapping) else {})
        if not isinstance(node, dict):
            raise ConfigError(here, f"expected a section, got {node!r}")
        choosing = depth == len(keys) - 2 and isinstance(inner, Choice) and keys[-1] == inner.key
        known = {} if choosing else inner.fields(node, here)
        nested = inner
    raise ConfigError("config", "an override needs a field, as in --config.seed=1")


def _drop_stale(node: dict[str, Any], choice: Choice, path: str) -> None:
    here = join("config", path.rpartition(".")[0])
    known = choice.fields(node, here)
    for key in [key for key in node if key not in known]:
        log.warning("%s.%s=%r dropped: %s has no such option", here, key, node.pop(key), node[choice.key])


def parse(text: str, annotation: Any, path: str) -> Any:
    """The text of an override as a value of the annotation's type."""
    found = _parse(text.strip(), annotation)
    if found is None:
        raise ConfigError(path, f"expected {schema.describe(annotation)}, got {text!r}")
    return schema.check(found[0], annotation, path)


def _parse(text: str, annotation: Any) -> tuple[Any] | None:  # a one-tuple, so that None can be a value
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _parse(text, args[0])
    if origin in (typing.Union, types.UnionType):
        ordered = sorted(args, key=lambda arg: arg is str)  # a string matches anything: last
        return next((found for arg in ordered if (found := _parse(text, arg)) is not None), None)
    if origin is Literal or annotation is str:
        return (text,)
    if annotation is types.NoneType:
        return (None,) if text.lower() == "none" else None
    if annotation is bool:
        return {"true": (True,), "false": (False,)}.get(text.lower())
    try:
        if origin is tuple:
            if text.startswith(("(", "[")):
                return (plain(ast.literal_eval(text)),)
            items = [item for item in text.split(",") if item]
            kinds = [args[0]] * len(items) if len(args) == 2 and args[1] is Ellipsis else args
            values = [_parse(item.strip(), kind) for item, kind in zip(items, kinds)]
            whole = len(kinds) == len(items) and None not in values
            return (tuple(value[0] for value in values if value),) if whole else None
        return (annotation(text),)
    except (ValueError, SyntaxError):
        return None


def as_flag(path: str, value: Any) -> str:
    """The override as a command-line word that parses back to the same value."""
    return f"--config.{path}={value if isinstance(value, str) else repr(value)}"


def resolve(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Checks every leaf, fills in defaults, builds the model from shapes alone. Raises ConfigError."""
    found = schema.resolve(plain(tree), schema.options(Experiment), "config")
    with within("config"):
        check_together(found)
    return ml_collections.ConfigDict(found, convert_dict=True).lock()


def check_together(config: Mapping[str, Any]) -> None:
    """What no single option can tell: divisions, and everything the constructors refuse."""
    with within("task"):
        task = TASKS.build(config["task"])
    if task.token_labels and "pooling" in HEADS.options(config["model"]["head"]["name"]):
        raise ConfigError(
            "model.head.name",
            f"{config['task']['name']} scores single tokens; use language_model and model.causal=True",
        )
    spec = task.spec
    with within("model"):
        model.functional(config["model"], spec).abstract()
    objectives.build(config)
    optim.build(config["optimizer"], config["train"]["steps"])
    train, accumulate = config["train"], config["optimizer"]["accumulate"]
    if train["batch_size"] % accumulate:
        raise ConfigError(
            "optimizer.accumulate", f"{accumulate} micro-batches do not divide train.batch_size {train['batch_size']}"
        )
    free = [axis for axis, size in config["mesh"].items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}", f"only one axis can be -1, and mesh.{free[0]} is; give it a number")
    for axis, size in config["mesh"].items():
        if size == 0:
            raise ConfigError(f"mesh.{axis}", "0 devices; use 1 for an axis that is not used, -1 for what is left")


def config_hash(config: Mapping[str, Any] | ml_collections.ConfigDict) -> str:
    """Names the experiment: 12 hex digits of SHA-256 over the resolved config without NOT_IDENTITY and unused ADDED."""
    tree = plain(config)
    for path in NOT_IDENTITY:
        for node, leaf in _places(tree, path.split(".")):
            node.pop(leaf)
    for path, original in ADDED:
        for node, leaf in _places(tree, path.split(".")):
            if node[leaf] == original and type(node[leaf]) is type(original):
                node.pop(leaf)
    if (task := tree["task"]).get("tsv_dir") is not None:
        task["tsv_dir"] = "given"
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _places(tree: dict[str, Any], keys: list[str]) -> list[tuple[dict[str, Any], str]]:
    """Where a path leads, as (section, key); "*" stands for every key of a section."""
    first, *rest = keys
    found = list(tree) if first == "*" else [first] if first in tree else []
    if not rest:
        return [(tree, key) for key in found]
    return [place for key in found if isinstance(tree[key], dict) for place in _places(tree[key], rest)]
