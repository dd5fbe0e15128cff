"""timm's and transformers' image models: `count NAME ...` gives parameter counts, `logits NAME PIXELS` a forward pass.

Names are timm's; transformers' PoolFormer-S12 is called transformers_poolformer_s12.
"""

import sys
from unittest.mock import MagicMock

import numpy as np
import torch

from tests.peers.sides import run, state_arrays


def build(name: str) -> torch.nn.Module:
    if name.startswith("transformers_"):
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # not wanted, and one that does not fit torch breaks
        from transformers import PoolFormerConfig, PoolFormerForImageClassification

        return PoolFormerForImageClassification(PoolFormerConfig(num_labels=1000))
    for part in ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms"):
        sys.modules["torchvision" + part] = MagicMock()
    sys.modules["torchvision.transforms.functional"] = MagicMock()
    import timm

    return timm.create_model(name)


def main() -> dict[str, np.ndarray]:
    mode, *rest = sys.argv[2:]
    if mode == "count":
        with torch.device("meta"):
            return {name: np.array(sum(p.numel() for p in build(name).parameters())) for name in rest}
    name, pixels = rest[0], int(rest[1])
    torch.manual_seed(0)
    model = build(name).eval()
    with torch.no_grad():
        for weight in model.parameters():  # nothing at 0 or 1, and every branch counts
            weight.add_((0.3 if weight.ndim < 2 else 0.02) * torch.randn_like(weight))
        x = torch.randn(2, 3, pixels, pixels)
        logits = model(x)
        logits = getattr(logits, "logits", logits)
    return {**state_arrays(model), "x": x.permute(0, 2, 3, 1).numpy(), "logits": logits.numpy()}


if __name__ == "__main__":
    run(main)
