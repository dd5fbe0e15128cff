"""The attention cost table: closed forms against masks, the count against the closed forms, and the command."""

import numpy as np
import pytest

from arch.errors import ConfigError
from arch.spec import InputSpec
from experiments import attention_cost, spans
from experiments import config as configs
from experiments.learning import records
from experiments.spans import Span

SOURCE = "configs/masformer/text_file.py:tiny"
SPEC = InputSpec(vocab_size=7, num_classes=7, length=8)


def model(near=None, **options):
    return {
        "topology": "masformer", "width": 8, "depth": 6, "num_full": 2, "where": "first", "full": "full",
        "near": "near", "channel": "mlp", "norm": {"name": "layer"}, "norm_placement": "pre", "scan": False,
        "dropout": 0.0,
        "parts": {
            "full": {"kind": "softmax", "num_heads": 2, "head_dim": None, "implementation": None},
            "near": {"kind": "local", "num_heads": 2, "head_dim": None, "implementation": None, "window": None,
                     "block": None, "order": "contiguous", **(near or {"block": 16})},
            "mlp": {"kind": "mlp", "hidden": 4},
        },
        "positions": {"name": "rotary"}, "head": {"name": "language_model"}, "causal": True, **options,
    }  # fmt: skip


def mask(span, length):
    t = np.arange(length)
    offset = t[None] - t[:, None]
    seen = (offset <= 0) | (not span.causal)
    if span.block is not None:
        return seen & (t[:, None] // span.block == t[None] // span.block)
    if span.window is not None:
        return (offset >= -span.sides[0]) & (offset <= span.sides[1])
    return seen


@pytest.mark.parametrize("length", [1, 16, 40, 64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [{}, {"block": 16}, {"block": 100}, {"window": 5}, {"window": 16}, {"window": 100}])
def test_visible_pairs_are_those_of_the_mask(kind, causal, length):
    span = Span(heads=1, width=4, causal=causal, **kind)
    assert span.visible(length) == mask(span, length).sum()
    if length % 16 == 0 and "window" not in kind:
        assert span.squares(length) == (2 * span.visible(length) - length if causal else span.visible(length))


@pytest.mark.parametrize("length", [16, 64, 128])
def test_what_is_saved_is_the_formula(length):
    """In squares exactly; in the pairs a causal model has a use for within 1/T; of a window its square."""
    table = spans.attention_flops(model(), SPEC, length)
    wanted = (1 - 2 / 6) * (1 - 16 / length)
    assert spans.formula(model(), length) == pytest.approx(wanted)
    assert attention_cost.saved(table, "squares") == pytest.approx(wanted, abs=1e-12)
    assert attention_cost.saved(table, "visible") == pytest.approx(wanted, abs=1 / length)
    window = {name: {"visible": spans.closed_form(side, length, "visible")}
              for name, side in spans.sides(model({"window": 16})).items()}  # fmt: skip
    assert attention_cost.saved(window, "visible") == pytest.approx(
        (1 - 2 / 6) * (1 - 16 / length) ** 2, abs=1 / length
    )


def test_the_papers_figure():
    """4 full layers of 24, blocks of 1024, 8192 tokens: 73 % of the attention is saved."""
    tree = configs.plain(configs.configure("configs/masformer/text_file.py:1.3B"))["model"]
    full, mine = (spans.closed_form(spans.sides(tree)[name], 8192, "visible") for name in ("all full", "masformer"))
    assert 1 - mine / full == pytest.approx(0.729, abs=5e-4)
    assert full == 24 * 4 * 2048 * 8192 * 8193 / 2


def test_scanned_layers_count_as_single_ones():
    plain, scanned = model(), model(scan=True)
    assert spans.attention_flops(plain, SPEC, 32) == spans.attention_flops(scanned, SPEC, 32)


def test_a_wrong_closed_form_is_noticed(monkeypatch):
    monkeypatch.setattr(Span, "squares", lambda self, length: length**2 + 1)
    with pytest.raises(AssertionError, match="all full at 32: the jaxpr has"):
        spans.attention_flops(model(), SPEC, 32)


def test_a_window_counts_at_least_what_is_visible():
    table = spans.attention_flops(model({"window": 16}), SPEC, 128)
    for row in table.values():
        assert row["computed"] >= row["visible"]
    assert table["all near"]["squares"] is None
    assert spans.formula(model({"window": 16}), 128) is None


def test_sides():
    sides = spans.sides(model(where=(3, 1), num_full=None))
    roles = {name: "".join(role[0] for role in spans.layers(side)) for name, side in sides.items()}
    assert roles == {"all full": "ffffff", "masformer": "nfnfnn", "all near": "nnnnnn"}


def test_what_has_no_closed_form_is_named():
    tree = model({"kind": "mamba"})
    with pytest.raises(
        ConfigError, match=r"^model\.parts\.near\.kind: closed forms are known of softmax .*, not of mamba"
    ):
        spans.roles(tree)
    with pytest.raises(ConfigError, match=r"^model\.topology: metaformer has no full and near layers"):
        spans.roles({"topology": "metaformer"})


@pytest.mark.parametrize("near", [{"block": 16}, {"window": 5}])
def test_the_stack_runs_each_role_in_its_layers(near):
    """Against whole score maps, layer by layer."""
    tree = model(near)
    run, (heads, width) = spans.stack(tree, heads=1)
    assert (heads, width) == (1, 4)
    rng = np.random.default_rng(0)
    x, scales = rng.normal(size=(1, 40, 1, 4)), rng.normal(size=(6, 3, 1, 4))
    wanted = x[0, :, 0]
    for role, (q, k, v) in zip(spans.layers(tree), scales[:, :, 0]):
        scores = (wanted * q) @ (wanted * k).T / 2
        weights = np.where(mask(spans.roles(tree)[role], 40), np.exp(scores - scores.max(1, keepdims=True)), 0)
        wanted = wanted + weights / weights.sum(1, keepdims=True) @ (wanted * v)
    got = run(x.astype(np.float32), scales.astype(np.float32))[0, :, 0]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_command_records_and_the_table_prints(tmp_path, capsys):
    record = tmp_path / "cost.jsonl"
    small = "--config.model.depth=2", "--config.model.width=16", "--config.model.parts.near.block=16"
    command = [f"--config={SOURCE}", f"--model={SOURCE}", *small, f"--record={record}"]
    assert attention_cost.main([*command, "--lengths=16", "--rounds=0"]) == 0
    assert attention_cost.main([*command, "--lengths=32", "--rounds=2", "--seconds=1"]) == 0
    out = capsys.readouterr().out
    assert "T 32: attention FLOPs saved squares 25.0%" in out
    found = records.read(record)
    assert [line["length"] for line in found] == [16, 32]
    assert {"device", "commit", "command", "time", "versions", "source", "overrides"} <= set(found[1])
    assert "op" not in found[0]
    for part in (found[1]["op"]["forward"], found[1]["op"]["gradient"], found[1]["model"]):
        assert set(part["seconds"]) == {"all full", "masformer", "all near"}
        assert all(value > 0 for value in part["seconds"].values())
        assert min(part["temp_bytes"].values()) > 0
    assert attention_cost.main(["--table", f"--record={record}"]) == 0
    out = capsys.readouterr().out
    assert SOURCE in out
    assert out.count("| 32 |") == 4  # FLOPs, two passes of the op, the step
    records.add(record, {**found[1], "saved": {**found[1]["saved"], "squares": 0.123}})
    attention_cost.main(["--table", f"--record={record}"])
    assert "12.3%" in capsys.readouterr().out  # the newest counts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config: missing; name a masformer config"),
        ([f"--config={SOURCE}", "--lengths=1k"], "--lengths: '1k' is not a list of lengths"),
        ([f"--config={SOURCE}", "--heads=0"], "--heads: must be 1 or more"),
        (["--config=configs/quickstart.py:softmax"], "config.model.topology: metaformer has no full and near layers"),
    ],
)
def test_mistakes(flags, message, capsys):
    assert attention_cost.main(flags) == 2
    assert message in capsys.readouterr().err


def test_an_empty_table_says_so(tmp_path, capsys):
    attention_cost.main(["--table", f"--record={tmp_path / 'none.jsonl'}"])
    assert "no record" in capsys.readouterr().out
