"""torchvision's detectors on an 800x1216 image, as they are and after pyseg.accelerate, whole and by replaced parts.

Weights are random, but scaled so that rounding stays rounding, as in a trained network: without trained batch norms the
backbone's activations grow to hundreds, and the heads' scores would all be nearly 0 or 1. Nothing is below the score
threshold, so there are always as many detections as a detector returns at most, 100. Without weights torchvision builds
them with nn.BatchNorm2d, which accelerate folds; with weights it takes FrozenBatchNorm2d, which it does not.

Results are compared with torchvision's in float32, since in float64 the masks alone take 800 MB. A part is a method of
a module, called with what the detector calls it with. The floor of a whole detector is that of its matrix products and
convolutions; what is least for the parts, the cases of roi_align, paste_masks and nms say.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from harness import Case, Contender, Prepared, Workload
from peers import compiled_for_inference

BASELINE = "torchvision"
FAMILY = "detectors"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row
NETWORKS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")
TOLERANCE = 1e-4
HEIGHT, WIDTH = 800, 1216
# What is replaced: its name, the module and the method; in all detectors, and in those with masks or keypoints.
PARTS = {
    "box pooling": ("roi_heads.box_roi_pool", "forward"),
    "suppression of proposals": ("rpn", "filter_proposals"),
    "suppression of detections": ("roi_heads", "postprocess_detections"),
}
MASK_PARTS = {"mask pooling": ("roi_heads.mask_roi_pool", "forward"), "mask pasting": ("transform", "postprocess")}
KEYPOINT_PARTS = {"keypoint pooling": ("roi_heads.keypoint_roi_pool", "forward")}


def cases() -> list[Case]:
    parts = {name: dict(PARTS) for name in NETWORKS}
    parts["maskrcnn_resnet50_fpn"] |= MASK_PARTS
    parts["keypointrcnn_resnet50_fpn"] |= KEYPOINT_PARTS
    of_networks = [
        [_whole(name), *(_part(name, part, *parts[name][part]) for part in parts[name])] for name in NETWORKS
    ]
    return [case for each in of_networks for case in each]


def detector(name: str, height: int, width: int, **arguments: Any) -> nn.Module:
    """One of torchvision's, in eval mode, for images of this size."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    sizes = {"min_size": min(height, width), "max_size": max(height, width)}
    model = get_model(name, weights=None, weights_backbone=None, box_score_thresh=0.0, **sizes, **arguments)
    with torch.no_grad():
        for block in model.backbone.fpn.layer_blocks:
            block[0].weight.div_(50)
        for scores in (model.rpn.head.cls_logits, model.roi_heads.box_predictor.cls_score):
            scores.weight.mul_(10)
    return model.eval().requires_grad_(False)


def image(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _case(
    name: str,
    groups: tuple[str, ...],
    build: Callable[[], Workload],
    parameters: dict[str, Any],
    least: Callable[[], tuple[int, int]] = lambda: (0, 0),
) -> Case:
    return Case(
        name=name,
        groups=groups,
        build=build,
        params={**parameters, "input": [3, HEIGHT, WIDTH], "dtype": "float32"},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=least,
    )


# ---- whole ----


def _whole(name: str) -> Case:
    def build() -> Workload:
        model, x = detector(name, HEIGHT, WIDTH), image(HEIGHT, WIDTH)

        def prepared(network: nn.Module, path: str = "") -> Prepared:
            return Prepared(lambda: _tensors(network([x])), path=path)

        def compiled() -> Prepared:
            network = copy.deepcopy(model)
            network.backbone = compiled_for_inference(network.backbone, network.transform([x])[0].tensors)
            return prepared(network)

        def accelerated() -> Prepared:
            import pyseg

            network = pyseg.accelerate(copy.deepcopy(model), ([x],), rounds=1)
            changed = any(row.became for row in pyseg.report(network).rows)
            return prepared(network, "accelerated" if changed else "torch")

        def expected() -> list[Tensor]:
            with torch.inference_mode():
                return _tensors(model([x]))

        return Workload(
            [
                Contender(BASELINE, lambda: prepared(model)),
                Contender(
                    "torchvision channels_last",
                    lambda: prepared(copy.deepcopy(model).to(memory_format=torch.channels_last)),
                ),
                Contender("torchvision, backbone compiled", compiled),
                Contender("pyseg.accelerate", accelerated, ours=True),
            ],
            expected,
        )

    groups = (FAMILY, f"{FAMILY}, {name}")
    return _case(f"{FAMILY}/{name}/whole", groups, build, {"model": name}, lambda: _least(name))


def _least(name: str) -> tuple[int, int]:
    """Operations of one inference, as torch counts them; bytes of the weights and the image."""
    model, x = detector(name, HEIGHT, WIDTH), image(HEIGHT, WIDTH)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model([x])
    return counter.get_total_flops(), x.nbytes + sum(parameter.nbytes for parameter in model.parameters())


# ---- parts ----


def _part(name: str, part: str, module: str, method: str) -> Case:
    def build() -> Workload:
        model = detector(name, HEIGHT, WIDTH)
        with torch.inference_mode():
            arguments = _recorded(model, model.get_submodule(module), method)

        def prepared(network: nn.Module) -> Prepared:
            call = getattr(network.get_submodule(module), method)
            # The containers are copied, since a method may write into them; it leaves the tensors alone.
            return Prepared(lambda: _tensors(call(*pytree.tree_map(lambda leaf: leaf, arguments))))

        def ours() -> Prepared:
            import pyseg

            return prepared(pyseg.accelerate(copy.deepcopy(model)))

        def expected() -> list[Tensor]:
            with torch.inference_mode():
                return prepared(model).call()

        return Workload(
            [Contender(BASELINE, lambda: prepared(model)), Contender("pyseg", ours, ours=True)],
            expected,
        )

    groups = (f"{FAMILY}, {part}",)
    return _case(f"{FAMILY}/{name}/{part}", groups, build, {"model": name, "method": f"{module}.{method}"})


def _recorded(model: nn.Module, module: nn.Module, method: str) -> tuple[Any, ...]:
    """What the detector calls a method of one of its modules with."""
    original, seen = getattr(module, method), []

    def recorder(*arguments: Any) -> Any:
        seen.append(pytree.tree_map(lambda leaf: leaf, arguments))
        return original(*arguments)

    setattr(module, method, recorder)
    try:
        model([image(HEIGHT, WIDTH)])
    finally:
        delattr(module, method)
    (arguments,) = seen
    return arguments
