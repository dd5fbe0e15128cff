"""PoolFormer, the MetaFormer baselines and DeiT against timm and transformers: parameter counts, and logits of the
copied weights. RandFormer and IdentityFormer are in neither; tests/arch/topologies/test_pyramid_sizes.py has the
published sizes of all.
"""

import jax
import numpy as np
import pytest

from arch.accounting import count_params
from arch.model import functional
from arch.spec import ImageSpec
from experiments import config, importing
from tests.numerics import rel_rms
from tests.peers.harness import peer

SMALL_LAYER_NORM = {"last_norm": False, "head": {"name": "metaformer"}}  # timm's PoolFormer v1, see importing

OURS = {
    **{f"poolformer_{size}": f"metaformer/poolformer.py:{size}" for size in ("s12", "s24", "s36", "m36", "m48")},
    **{
        name: f"metaformer/baselines.py:{name}"
        for family, sizes in (
            ("poolformerv2", ("s12", "s24", "s36", "m36", "m48")),
            ("convformer", ("s18", "s36", "m36", "b36")),
            ("caformer", ("s18", "s36", "m36", "b36")),
        )
        for name in [f"{family}_{size}" for size in sizes]
    },
    **{f"deit_{size}_patch16_224": f"vision/deit.py:{size}" for size in ("tiny", "small", "base")},
}


def model(source: str) -> dict:
    return config.plain(config.configure(f"configs/{source}"))["model"]


@pytest.mark.peers
def test_parameter_counts(tmp_path):
    counts = peer("vision", tmp_path, "count", *OURS, needs=("torch", "timm"))
    spec = ImageSpec(224, 224, 3, 1000)
    assert {name: count_params(model(source), spec) for name, source in OURS.items()} == {
        name: int(count) for name, count in counts.items()
    }


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "pixels", "convert", "changes"),
    [
        ("poolformer_s12", 224, importing.timm_metaformer, SMALL_LAYER_NORM),
        ("transformers_poolformer_s12", 224, importing.transformers_poolformer, {}),
        ("poolformerv2_s12", 96, importing.timm_metaformer, {}),
        ("convformer_s18", 96, importing.timm_metaformer, {}),
        ("caformer_s18", 96, importing.timm_metaformer, {}),
        ("deit_tiny_patch16_224", 224, importing.timm_vit, {}),
    ],
)
def test_logits(name, pixels, convert, changes, tmp_path):
    library = "transformers" if "transformers" in name else "timm"
    a = peer("vision", tmp_path, "logits", name, str(pixels), needs=("torch", library))
    ours = {**model(OURS[name.removeprefix("transformers_")]), **changes}
    net = functional(ours, ImageSpec(pixels, pixels, 3, 1000))
    state = {key.removeprefix("w/"): value for key, value in a.items() if key.startswith("w/")}
    logits = jax.jit(net.apply)(importing.parameters(convert(state), net), a["x"])
    assert np.std(a["logits"]) > 0.1
    assert rel_rms(logits, a["logits"]) < 1e-4
