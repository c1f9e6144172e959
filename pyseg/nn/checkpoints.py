"""Checkpoints of other libraries' blocks, for pyseg.nn's.

    aspp = pyseg.nn.ASPP(2048, (12, 24, 36))
    aspp.load_state_dict(checkpoints.aspp_from_smp(model.state_dict(), prefix="decoder.aspp."))

Each function takes a state_dict, of the block itself or of a whole model with the block's `prefix` in it, and returns
the state_dict for our block. Keys outside the prefix are left out; a prefix without any keys raises ValueError.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]


def aspp_from_torchvision(state_dict: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """torchvision's ASPP: the same keys. In its DeepLabV3 the prefix is "classifier.0."."""
    return _below(state_dict, prefix, "aspp_from_torchvision")


def aspp_from_smp(state_dict: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """segmentation-models-pytorch's ASPP: the same keys, also of separable branches.

    The prefix is "decoder.aspp." in its DeepLabV3 and "decoder.aspp.0." in its DeepLabV3Plus.
    """
    return _below(state_dict, prefix, "aspp_from_smp")


def aspp_from_mmseg(state_dict: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """mmsegmentation's ASPPHead and DepthwiseSeparableASPPHead; the prefix is "decode_head." in its models.

    For ASPP(..., project_kernel_size=3, dropout=0.0), of the separable head with separable=True, separable_norm=True.
    The first of the head's dilations must be 1. With the keys

        aspp_modules.i.conv, .bn                    ->  convs.i.0, convs.i.1
        aspp_modules.i.depthwise_conv.conv, .bn     ->  convs.i.0.0, convs.i.0.1
        aspp_modules.i.pointwise_conv.conv, .bn     ->  convs.i.0.3, convs.i.1
        image_pool.1.conv, .bn                      ->  convs.L.1, convs.L.2, L being the last
        bottleneck...                               ->  project, like a branch

    The head concatenates the pooled branch first, we last: the bottleneck's input channels change their order. What
    follows the bottleneck in the heads (c1_bottleneck, sep_bottleneck, conv_seg) is left out.
    """
    keys = _below(state_dict, prefix, "aspp_from_mmseg")
    names = [re.match(r"aspp_modules\.(\d+)\.", key) for key in keys]
    last = 1 + max((int(name[1]) for name in names if name), default=-1)
    if last == 0 or "image_pool.1.conv.weight" not in keys:
        raise ValueError(f"aspp_from_mmseg: state_dict must have aspp_modules and image_pool, got {sorted(keys)[:3]}")
    if "aspp_modules.0.conv.weight" not in keys or keys["aspp_modules.0.conv.weight"].shape[2] != 1:
        raise ValueError("aspp_from_mmseg: the head's first dilation must be 1, got a 3x3 convolution")
    pooled = keys["image_pool.1.conv.weight"].shape[0]
    converted: dict[str, Tensor] = {}
    for key, value in keys.items():
        head, _, rest = key.partition(".")
        if head == "aspp_modules":
            index, _, rest = rest.partition(".")
            converted[f"convs.{index}.{_branch_key(rest)}"] = value
        elif head == "image_pool":
            kind, _, rest = rest.removeprefix("1.").partition(".")
            converted[f"convs.{last}.{'1' if kind == 'conv' else '2'}.{rest}"] = value
        elif head == "bottleneck":
            converted[f"project.{_branch_key(rest)}"] = _pooled_last(rest, value, pooled)
    return converted


def jpu_from_fastfcn(state_dict: StateDict, prefix: str = "jpu.") -> dict[str, Tensor]:
    """FastFCN's JPU: the same keys, below "jpu." in its models."""
    return _below(state_dict, prefix, "jpu_from_fastfcn")


def _below(state_dict: StateDict, prefix: str, function: str) -> dict[str, Tensor]:
    found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not found:
        raise ValueError(f"{function}: prefix must begin some keys of state_dict, got '{prefix}'")
    return found


_BRANCH = {
    "conv": "0",
    "bn": "1",
    "depthwise_conv.conv": "0.0",
    "depthwise_conv.bn": "0.1",
    "pointwise_conv.conv": "0.3",
    "pointwise_conv.bn": "1",
}


def _branch_key(key: str) -> str:
    module, _, parameter = key.rpartition(".")
    if module not in _BRANCH:
        raise ValueError(f"aspp_from_mmseg: state_dict must have convolutions and batch norms alone, got a '{module}'")
    return f"{_BRANCH[module]}.{parameter}"


def _pooled_last(key: str, value: Tensor, pooled: int) -> Tensor:
    """A tensor of the bottleneck with the first `pooled` of the concatenated channels moved behind the others."""
    if key in ("conv.weight", "pointwise_conv.conv.weight"):
        return torch.cat([value[:, pooled:], value[:, :pooled]], 1)
    if key.startswith("depthwise_conv.") and value.dim() > 0:
        return torch.cat([value[pooled:], value[:pooled]])
    return value
