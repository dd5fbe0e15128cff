"""A config's model as a picture file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arch.errors import ConfigError
from arch.spec import ImageSpec, Spec
from experiments.drawing import scene
from experiments.drawing.layout import BACKGROUND, LINE, Totals, count, lay_out, si
from experiments.drawing.outline import Node, outline
from experiments.drawing.trace import Call, trace

FORMATS = (".svg", ".png", ".pdf")


def picture(model: Mapping[str, Any], spec: Spec, title: str) -> scene.Scene:
    """The diagram of a config's section `model` for a task's inputs."""
    root = trace(model, spec)
    items = [_input(spec), *outline(root), _output(root)]
    totals = Totals(sum(item.total for item in items), root.flops)
    form = f"causal {model['topology']}" if model.get("causal") else model["topology"]
    subtitle = f"{form}, {count(totals.params)} parameters, {si(totals.flops)} FLOPs forward (one example)"
    return lay_out(items, title, subtitle, totals)


def draw(model: Mapping[str, Any], spec: Spec, title: str, file: Path) -> scene.Scene:
    """Writes the diagram; the file's name says in which format."""
    if file.suffix not in FORMATS:
        raise ConfigError("--draw", f"{file} ends in none of {', '.join(FORMATS)}")
    made = picture(model, spec, title)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".svg":
        file.write_text(scene.svg(made, title, BACKGROUND, LINE), encoding="utf-8")
    else:
        scene.picture(made, BACKGROUND, file)
    return made


def _input(spec: Spec) -> Node:
    title = "image" if isinstance(spec, ImageSpec) else "pair of token rows" if spec.pair else "token ids"
    return Node("box", "input", title, gives=(1, *spec.shape))


def _output(root: Call) -> Node:
    return Node("box", "input", "image" if len(root.output) == 4 else "logits", takes=root.output)
