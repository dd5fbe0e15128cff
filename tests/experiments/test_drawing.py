"""Diagrams: every parameter is in a box, boxes lie apart and hold their text, what repeats is folded."""

import itertools
import xml.etree.ElementTree as ET

import pytest

from arch import accounting
from arch.registry import TASKS
from arch.spec import InputSpec
from experiments import config, drawing, plan
from experiments.drawing import scene as scenes
from experiments.drawing.outline import outline
from experiments.drawing.scene import Rect, Text, width_of
from experiments.drawing.trace import trace

SPEC = InputSpec(vocab_size=11, num_classes=3, length=12)
SOFTMAX = {"kind": "softmax", "num_heads": 2}


def model(**changes):
    """A resolved section `model`; two blocks of width 8."""
    tree = {
        "topology": "metaformer",
        "width": 8,
        "parts": {"mixer": SOFTMAX, "pooling": {"kind": "pooling"}, "mlp": {"kind": "mlp", "hidden": 16}},
        "norm": {"name": "layer"},
        "positions": {"name": "learned"},
        "head": {"name": "classifier"},
        **({"depth": 2} if changes.get("topology") != "fit" else {}),
        **({"layers": ("mixer",)} if "topology" not in changes else {}),
        **changes,
    }
    return tree


CASES = {
    "plain": {},
    "post": {"norm_placement": "post"},
    "parallel": {"parallel": True},
    "layer scale": {"layer_scale": 0.1},
    "scan": {"scan": True, "depth": 4},
    "loops": {"loops": 3},
    "hybrid": {"layers": ("pooling", "pooling", "mixer"), "depth": 7},
    "wrapped": {"parts": {"mixer": {"kind": "bidirectional", "mixer": {"kind": "linear"}}, "mlp": {"kind": "mlp"}}},
    "no channel mixer": {"channel": None},
    "fit": {
        "topology": "fit",
        "pattern": "(1)2(1)",
        "group_size": 4,
        "latents": 2,
        "local_parts": ("mixer",),
        "global_parts": ("mixer",),
        "cross_heads": 2,
        "token_positions": "learned",
        "head": {"name": "classifier", "pooling": "mean"},
    },
    "widenet": {"topology": "widenet", "channel": "mlp", "depth": 3},
    "masformer": {"topology": "masformer", "full": "mixer", "near": "pooling", "num_full": 1, "depth": 3},
    "read": {"read": "pooled"},
}


@pytest.fixture(scope="module", params=CASES)
def drawn(request):
    tree = model(**CASES[request.param])
    return tree, drawing.picture(tree, SPEC, request.param)


def test_boxes_hold_every_parameter_once(drawn):
    tree, scene = drawn
    assert sum(box.params * box.copies for box in scene.boxes) == accounting.count_params(tree, SPEC)
    inside = sum(box.flops for box in scene.boxes)
    total = accounting.forward_flops(tree, SPEC)
    assert 0.9 * total < inside <= total  # the rest is residual additions


def apart(a: Rect, b: Rect) -> bool:
    return a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y


def within(a: Rect, b: Rect) -> bool:
    return b.x <= a.x and a.x + a.w <= b.x + b.w and b.y <= a.y and a.y + a.h <= b.y + b.h


def test_nothing_overlaps_and_text_fits(drawn):
    _, scene = drawn
    rects = [box.rect for box in scene.boxes]
    assert all(apart(a, b) for a, b in itertools.combinations(rects, 2))
    for box in rects:
        assert all(apart(box, frame) or within(box, frame) for frame in scene.frames)
    for a, b in itertools.combinations(scene.frames, 2):
        assert apart(a, b) or within(a, b) or within(b, a)
    for box in scene.boxes:
        texts = [mark for mark in box.marks if isinstance(mark, Text)]
        for text in texts:
            assert within(Rect(text.left, text.y - text.size, text.right - text.left, text.size, ""), box.rect), text
        for a, b in itertools.combinations(texts, 2):
            assert a.right <= b.left or b.right <= a.left or abs(a.y - b.y) >= 10, (a.text, b.text)
    for mark in scene.everything():
        if isinstance(mark, Text):
            assert within(
                Rect(mark.left, mark.y - 8, mark.right - mark.left, 8, ""), Rect(0, 0, scene.w, scene.h, "")
            ), mark


def test_svg_is_xml_and_says_what_it_shows(drawn):
    tree, scene = drawn
    root = ET.fromstring(scenes.svg(scene, "a <title> & more", "#fff", "#000"))
    boxes = [each for each in root.iter("{http://www.w3.org/2000/svg}g") if each.get("class") == "box"]
    counts = [int(box.get("data-params")) * int(box.get("data-copies")) for box in boxes]
    assert sum(counts) == accounting.count_params(tree, SPEC)


def frames(items):
    return [frame for item in items for frame in ([item] if item.form == "frame" else []) + frames(item.items)]


def folded(**changes):
    """[(title, repeats, shared), ...] of all frames, outer ones first."""
    return [(each.title, each.repeats, each.shared) for each in frames(outline(trace(model(**changes), SPEC)))]


def test_alike_blocks_are_folded():
    assert folded(depth=3) == [("block", 3, False)]
    assert folded(depth=3, scan=True) == [("block", 3, False)]
    assert folded(layers=("pooling", "pooling", "mixer"), depth=6) == [
        ("pattern", 2, False),
        ("block: pooling", 2, False),
        ("block", 1, False),
    ]
    assert folded(layers=("pooling", "mixer"), depth=3, layer_overrides=((1, "pooling"), (2, "mixer"))) == [
        ("block: pooling", 2, False),
        ("block", 1, False),
    ]


def test_shared_weights_are_marked():
    assert folded(depth=1, loops=3) == [("block", 3, True)]
    assert folded(depth=2, loops=3) == [("loop", 3, True), ("block", 2, False)]


def test_what_only_some_boxes_share_is_marked_there():
    items = outline(trace(model(topology="widenet", channel="mlp", depth=3), SPEC))
    (frame,) = frames(items)
    assert (frame.repeats, frame.shared) == (3, False)
    assert {box.title: (box.shared, len(box.sets)) for box in frame.boxes()} == {
        "layer norm": (False, 3),
        "softmax": (True, 1),
        "mlp": (True, 1),
    }


def test_lanes_follow_the_topology():
    (lanes,) = [item for item in outline(trace(model(**CASES["fit"]), SPEC)) if item.form == "lanes"]
    assert [(item.title, item.lanes) for item in lanes.items] == [
        ("places in a group", ("tokens",)),
        ("latents at first", ("latents",)),
        ("local: block", ("tokens",)),
        ("read", ("tokens", "latents")),
        ("latent: block", ("latents",)),
        ("write", ("latents", "tokens")),
        ("local: block", ("tokens",)),
    ]


def test_classes_are_put_back():
    from arch.mixers.softmax import Softmax

    before = Softmax.__call__
    trace(model(), SPEC)
    assert Softmax.__call__ is before


def test_widths_are_those_of_the_widest_font():
    """matplotlib's DejaVu Sans, which is wider than Helvetica and Arial."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    for text in ("classifier head", "bidirectional", "[B 56×56 64]", "hidden 1024, 8 heads", "12.3M", "MMWW"):
        for bold in (False, True):
            font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=10)
            wide, _, _ = TextToPath().get_text_width_height_descent(text, font, False)
            assert width_of(text, 10, bold) >= 0.98 * wide, text


def test_plan_draws(tmp_path, capsys):
    for name in ("a.svg", "a.png"):
        plan.main([f"--config={__file__}", f"--draw={tmp_path / name}"])
        assert (tmp_path / name).stat().st_size > 2_000
    assert "boxes" in capsys.readouterr().out
    assert plan.main([f"--config={__file__}", "--draw=a.gif"]) == 2
    assert "ends in none of .svg" in capsys.readouterr().err


def get_config():
    """What test_plan_draws draws."""
    from tests.experiments import tiny

    return tiny.get_config()


def test_resolved_configs_draw():
    tree = config.plain(config.configure("configs/quickstart.py:hybrid"))
    scene = drawing.picture(tree["model"], TASKS.build(tree["task"]).spec, "hybrid")
    assert {box.kind for box in scene.boxes} >= {"embedding", "positions", "mixer", "channel mixer", "norm", "head"}
