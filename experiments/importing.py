"""Weights of other libraries' image models under our names: a state dict given as arrays becomes our parameters.

    params = importing.parameters(importing.timm_metaformer(state), functional(model, spec))

`state` maps torch names to NumPy arrays, {name: value.numpy() for name, value in module.state_dict().items()}; torch is
not needed here. Kernels are turned from [out in ...] to [... in out]; nothing else is computed.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from arch.errors import Mistake
from arch.model import Functional, Params

State = Mapping[str, np.ndarray]
Rules = Sequence[tuple[str, str]]  # (a pattern at the front of a torch name, what stands there in ours)

BLOCK = r"stages\.(\d+)\.blocks\.(\d+)\."
OURS = r"topology/stages/\1/blocks/\2/"
TIMM_METAFORMER: Rules = (
    (r"stem\.(conv|norm)\.", r"embed/\1/"),
    *((rf"stages\.{i + 1}\.downsample\.(conv|norm)\.", rf"topology/downs/{i}/\1/") for i in range(3)),
    (BLOCK + r"norm1\.", OURS + "mix/norm/"),
    (BLOCK + r"norm2\.", OURS + "transform/norm/"),
    (BLOCK + r"layer_scale1\.scale", OURS + "mix/scale"),
    (BLOCK + r"layer_scale2\.scale", OURS + "transform/scale"),
    (BLOCK + r"res_scale1\.scale", OURS + "mix/residual_scale"),
    (BLOCK + r"res_scale2\.scale", OURS + "transform/residual_scale"),
    (BLOCK + r"token_mixer\.pwconv1\.", OURS + "mixer/up/"),
    (BLOCK + r"token_mixer\.act1\.", OURS + "mixer/activation/"),
    (BLOCK + r"token_mixer\.dwconv\.", OURS + "mixer/conv/"),
    (BLOCK + r"token_mixer\.pwconv2\.", OURS + "mixer/down/"),
    (BLOCK + r"token_mixer\.qkv\.", OURS + "mixer/qkv/"),
    (BLOCK + r"token_mixer\.proj\.", OURS + "mixer/out/"),
    (BLOCK + r"mlp\.fc1\.", OURS + "channel/up/"),
    (BLOCK + r"mlp\.act\.", OURS + "channel/activation/"),
    (BLOCK + r"mlp\.fc2\.", OURS + "channel/down/"),
    (r"head\.norm\.", "head/norm/"),
    (r"head\.fc\.fc1\.", "head/hidden/"),
    (r"head\.fc\.norm\.", "head/hidden_norm/"),
    (r"head\.fc\.fc2\.", "head/out/"),
    (r"head\.fc\.", "head/out/"),
)

HF_BLOCK = r"poolformer\.encoder\.block\.(\d+)\.(\d+)\."
TRANSFORMERS_POOLFORMER: Rules = (
    (r"poolformer\.encoder\.patch_embeddings\.0\.projection\.", "embed/conv/"),
    *(
        (rf"poolformer\.encoder\.patch_embeddings\.{i + 1}\.projection\.", f"topology/downs/{i}/conv/")
        for i in range(3)
    ),
    (HF_BLOCK + r"before_norm\.", OURS + "mix/norm/"),
    (HF_BLOCK + r"after_norm\.", OURS + "transform/norm/"),
    (HF_BLOCK + r"layer_scale_1", OURS + "mix/scale"),
    (HF_BLOCK + r"layer_scale_2", OURS + "transform/scale"),
    (HF_BLOCK + r"output\.conv1\.", OURS + "channel/up/"),
    (HF_BLOCK + r"output\.conv2\.", OURS + "channel/down/"),
    (r"norm\.", "topology/norm/"),
    (r"classifier\.", "head/out/"),
)

VIT_BLOCK = r"blocks\.(\d+)\."
TIMM_VIT: Rules = (
    (r"cls_token", "cls"),
    (r"pos_embed", "positions/table"),
    (r"patch_embed\.proj\.", "embed/proj/"),
    (VIT_BLOCK + r"norm1\.", r"topology/blocks/\1/mix/norm/"),
    (VIT_BLOCK + r"norm2\.", r"topology/blocks/\1/transform/norm/"),
    (VIT_BLOCK + r"attn\.qkv\.", r"topology/blocks/\1/mixer/qkv/"),
    (VIT_BLOCK + r"attn\.proj\.", r"topology/blocks/\1/mixer/out/"),
    (VIT_BLOCK + r"mlp\.fc1\.", r"topology/blocks/\1/channel/up/"),
    (VIT_BLOCK + r"mlp\.fc2\.", r"topology/blocks/\1/channel/down/"),
    (r"norm\.", "topology/norm/"),
    (r"head\.", "head/out/"),
)


def timm_metaformer(state: State) -> dict[str, np.ndarray]:
    """timm's `metaformer` family: PoolFormer v1 and v2, ConvFormer, CAFormer.

    Its PoolFormer v1 norms the mean over tokens by a layer norm, where the paper's code norms the grid before the mean:
    it fits a model with last_norm=False and the head `metaformer`.
    """
    return _renamed(state, TIMM_METAFORMER, _metaformer_array)


def transformers_poolformer(state: State) -> dict[str, np.ndarray]:
    """transformers' PoolFormerForImageClassification."""
    return _renamed(state, TRANSFORMERS_POOLFORMER, _metaformer_array)


def timm_vit(state: State) -> dict[str, np.ndarray]:
    """timm's VisionTransformer with a class token and no distillation: ViT, DeiT."""
    return _renamed(state, TIMM_VIT, _vit_array)


def parameters(found: Mapping[str, np.ndarray], net: Functional) -> Params:
    """The arrays by path as the nested parameters of `net`; every one of them must be there, of its shape."""
    wanted = _flat(net.abstract())
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or surplus:
        raise Mistake(f"these weights are of another model: it lacks {surplus[:5]}, they lack {missing[:5]}")
    params: Params = {}
    for path, shape in wanted.items():
        array = np.asarray(found[path], np.float32)
        if path.endswith(("activation/scale", "activation/bias")):
            array = array.reshape(shape)  # one number, [1] in torch
        if array.shape != shape:
            raise Mistake(f"{path} is {array.shape} in these weights and {shape} in the model")
        *parents, leaf = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = array
    return params


def _flat(tree: Params, path: str = "") -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for key, value in tree.items():
        here = f"{path}/{key}" if path else key
        found.update(_flat(value, here) if isinstance(value, dict) else {here: value.shape})
    return found


def _renamed(state: State, rules: Rules, convert: Callable[[str, np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, array in state.items():
        for pattern, replacement in rules:
            path, count = re.subn("^" + pattern, replacement, name)
            if count:
                break
        else:
            raise Mistake(f"no rule for the weight {name!r}: these weights are of another model")
        if path.endswith("/weight"):
            path = path.removesuffix("weight") + ("scale" if array.ndim == 1 else "kernel")
        found[path] = convert(path, array)
    return found


def _metaformer_array(path: str, array: np.ndarray) -> np.ndarray:
    if not path.endswith("/kernel"):
        return array
    if path.endswith("mixer/conv/kernel"):  # depthwise: [D 1 height width]
        return np.moveaxis(array[:, 0], 0, -1)
    if path.startswith(("embed/", "topology/downs/")):
        return array.transpose(2, 3, 1, 0)
    return array.reshape(array.shape[:2]).T  # a linear layer, also as a 1 x 1 convolution


def _vit_array(path: str, array: np.ndarray) -> np.ndarray:
    if path == "embed/proj/kernel":
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if path in ("cls", "positions/table"):
        return array.reshape(array.shape[-1] if path == "cls" else array.shape[1:])
    return array.T if path.endswith("/kernel") else array
