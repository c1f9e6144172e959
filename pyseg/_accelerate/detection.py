"""Parts of models that change as a whole. Of detectors: RoIAlign, non-maximum suppression, mask pasting; the blocks of
segmentation models are in blocks.py.

They are recognised by structure and name, so nothing here imports torchvision, detectron2 or mmcv. Pooling modules get
another forward. Suppression and pasting are functions that methods call: such a method is made anew from its own code,
with our functions in the place of those names among its globals. The module stays the object that it was; its class
becomes a subclass of its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyseg import functional as F
from pyseg._accelerate.blocks import block_methods, fits_block, is_block
from pyseg._accelerate.measure import Example, Outputs, _clone, difference, interleaved_ms, tensors_in
from pyseg._accelerate.modules import Swaps, is_accelerated
from pyseg._accelerate.report import Row
from pyseg._accelerate.structure import why_not
from pyseg.nn._folded import FusedBlock
from pyseg.nn.roi_align import pooled

# Devices whose kernels are in this installation.
_OPERATORS = ("roi_align", "multiscale_roi_align", "nms", "paste_masks", "crop_masks")
_DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if all(torch._C._dispatch_has_kernel_for_dispatch_key(f"pyseg::{name}", key) for name in _OPERATORS)
)
_DEPTH = 4  # functions that call functions that call ours


@dataclass(eq=False)
class Part:
    """A module of a model: what it becomes, by the methods that differ, and what was measured."""

    name: str
    module: nn.Module
    kind: type[nn.Module]
    methods: tuple[str, ...]
    what: str  # for the report
    before_ms: float = 0.0
    after_ms: float = 0.0
    difference: float = 0.0
    shape: tuple[int, ...] | None = None  # of the first tensor
    called: bool = False
    rejected: str = ""  # why it must stay as it is

    @property
    def is_block(self) -> bool:
        return is_block(self.kind.__bases__[0])

    @property
    def changes_now(self) -> bool:
        """Blocks run as ever in training mode."""
        return not (self.module.training and self.is_block)

    @property
    def faster(self) -> bool:
        return not self.called or self.after_ms < self.before_ms

    def row(self, used: bool) -> Row:
        row = Row(self.name, _original_name(self.module), self.what if used else "")
        if self.called:
            row.shape, row.before_ms, row.after_ms = self.shape, self.before_ms, self.after_ms
            row.difference = self.difference
        if self.rejected:
            row.reason = self.rejected
        elif not used:
            row.reason = "slower here"
        elif not self.changes_now:
            row.reason = "in eval mode only"
        elif not self.called:
            row.reason = "not called by the example"
        return row


def _original_name(module: nn.Module) -> str:
    kind = type(module)
    return kind.__bases__[0].__name__ if issubclass(kind, _Accelerated) else kind.__name__


def find_parts(model: nn.Module) -> list[Part]:
    """The parts of a model, in the order of named_modules."""
    parts = []
    for name, module in model.named_modules():
        if is_accelerated(module) or "forward" in module.__dict__:
            continue
        methods = _new_methods(type(module))
        if methods and _fits(module):
            what = ", ".join(dict.fromkeys(what for what, _ in methods.values()))
            part = Part(name, module, accelerated(type(module)), tuple(methods), what)
            part.rejected = why_not(module, part.kind) if part.is_block else ""
            parts.append(part)
    return parts


# ---- classes ----


class _Accelerated:
    """Mixed into every accelerated class: pickles and copies name the original class, ours is made from it again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__bases__[0],), self.__dict__


def _new(original: type[nn.Module]) -> nn.Module:
    kind = accelerated(original)
    return kind.__new__(kind)


_CLASSES: dict[Any, type[nn.Module]] = {}


def accelerated(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass that a module of this class becomes."""
    if original not in _CLASSES:
        methods = {name: method for name, (_, method) in _new_methods(original).items()}
        mixins = (_Accelerated, FusedBlock) if is_block(original) else (_Accelerated,)
        kind = type(original.__name__, (original, *mixins), {"__module__": __name__, **methods})
        _CLASSES[original] = kind
    return _CLASSES[original]


def _new_methods(kind: type[nn.Module]) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Of a class, the methods that change: what they are made of, and the new method."""
    if is_block(kind):
        what, changed = block_methods(kind)
        return {name: (what, method) for name, method in changed.items()}
    for names, forward in _POOLERS.items():
        if kind.__name__ in names:
            return {"forward": ("multiscale_roi_align" if forward is not _pool_one else "roi_align", forward(kind))}
    methods: dict[str, tuple[str, Callable[..., Any]]] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.split(".")[0] == "torch":
            continue
        for name, value in vars(base).items():
            if isinstance(value, FunctionType):
                methods.pop(name, None)
                found: dict[str, None] = {}
                rebound = _rebound(value, found, _DEPTH)
                if found:
                    methods[name] = (", ".join(found), rebound)
    return methods


# ---- pooling modules ----

_COMMON = ("output_size", "sampling_ratio")


def _fits(module: nn.Module) -> bool:
    """Whether a module with a known name has its attributes, in values that we compute the same for."""
    if is_block(type(module)):
        return fits_block(module)
    kind = type(module).__name__
    if kind == "MultiScaleRoIAlign":
        return all(hasattr(module, name) for name in (*_COMMON, "featmap_names", "canonical_scale", "canonical_level"))
    if kind == "ROIPooler":
        levels = list(getattr(module, "level_poolers", []))
        names = ("min_level", "max_level", "canonical_level", "canonical_box_size", "output_size")
        same = {(p.sampling_ratio, p.aligned) for p in levels if type(p).__name__ == "ROIAlign"}
        return (
            bool(levels)
            and all(hasattr(module, name) for name in names)
            and len(same) == 1
            and all(type(p).__name__ == "ROIAlign" for p in levels)
        )
    if kind in ("RoIAlign", "ROIAlign"):
        mode = getattr(module, "pool_mode", "avg")
        return all(hasattr(module, name) for name in (*_COMMON, "spatial_scale", "aligned")) and mode in ("avg", "max")
    return True


def _pool_torchvision(original: type[nn.Module]) -> Callable[..., Tensor]:
    def forward(self: Any, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [feature for name, feature in x.items() if name in self.featmap_names]
        if not _ours(*maps):
            return original.forward(self, x, boxes, image_shapes)
        scale, level = self.canonical_scale, self.canonical_level
        return pooled(maps, boxes, image_shapes, self.output_size, self.sampling_ratio, scale, level)

    return forward


def _pool_detectron2(original: type[nn.Module]) -> Callable[..., Tensor]:
    def forward(self: Any, x: list[Tensor], box_lists: list[Any]) -> Tensor:
        first = self.level_poolers[0]
        if not _ours(*x) or len(x) != len(self.level_poolers):
            return original.forward(self, x, box_lists)
        return F.multiscale_roi_align(
            x,
            [boxes.tensor for boxes in box_lists],
            self.output_size,
            [pooler.spatial_scale for pooler in self.level_poolers],
            first.sampling_ratio,
            first.aligned,
            levels=(self.min_level, self.max_level),
            canonical_size=self.canonical_box_size,
            canonical_level=self.canonical_level,
            epsilon=(1e-8, 0.0),
        )

    return forward


def _pool_one(original: type[nn.Module]) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor, rois: Any) -> Tensor:
        if not _ours(input):
            return original.forward(self, input, rois)
        mode: Literal["avg", "max"] = getattr(self, "pool_mode", "avg")
        return F.roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, mode=mode
        )

    return forward


_POOLERS: dict[tuple[str, ...], Callable[[type[nn.Module]], Callable[..., Tensor]]] = {
    ("MultiScaleRoIAlign",): _pool_torchvision,
    ("ROIPooler",): _pool_detectron2,
    ("RoIAlign", "ROIAlign"): _pool_one,
}


def _ours(*tensors: Tensor) -> bool:
    """Whether our kernels take them; what they do not take goes the way that it went."""
    return all(t.device.type in _DEVICES and t.is_floating_point() and not t.is_quantized for t in tensors)


# ---- functions ----


def _batched_nms(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        if not _ours(boxes, scores):
            return original(boxes, scores, idxs, iou_threshold)
        kept = F.batched_nms(boxes, scores, idxs.to(torch.int64), iou_threshold)
        # Of many boxes torchvision sorts the kept ones by a sort that is not stable, and so keeps other ones of equal
        # scores when the first are taken: the same sort makes the same choice.
        if boxes.numel() > (4_000 if boxes.device.type == "cpu" else 100_000):
            kept = kept.sort().values
            kept = kept[scores[kept].sort(descending=True).indices]
        return kept

    return batched_nms


def _nms(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        return F.nms(boxes, scores, iou_threshold) if _ours(boxes) else original(boxes, scores, iou_threshold)

    return nms


def _paste(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def paste_masks_in_image(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
        if not _ours(masks, boxes):
            return original(masks, boxes, img_shape, padding)
        return F.paste_masks(masks, boxes, img_shape, padding=padding)[:, None]

    return paste_masks_in_image


def _project(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def project_masks_on_boxes(gt_masks: Tensor, boxes: Tensor, matched_idxs: Tensor, M: int) -> Tensor:
        binary = gt_masks.dtype == torch.bool or (
            gt_masks.dtype == torch.uint8 and (gt_masks.numel() == 0 or int(gt_masks.max()) <= 1)
        )
        if not (_ours(boxes) and binary):  # of other values torchvision interpolates the values
            return original(gt_masks, boxes, matched_idxs, M)
        return F.crop_masks(gt_masks, boxes, matched_idxs, M).to(boxes.dtype)

    return project_masks_on_boxes


# The package that a function comes from, its name; what it is here, and how it is made.
_FUNCTIONS: dict[tuple[str, str], tuple[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]]] = {
    ("torchvision", "batched_nms"): ("batched_nms", _batched_nms),
    ("torchvision", "nms"): ("nms", _nms),
    ("torchvision", "paste_masks_in_image"): ("paste_masks", _paste),
    ("torchvision", "project_masks_on_boxes"): ("crop_masks", _project),
    ("detectron2", "batched_nms"): ("batched_nms", _batched_nms),
}


class _Namespace:
    """A module with some of its functions replaced."""

    def __init__(self, module: ModuleType, functions: dict[str, Any]) -> None:
        self.__dict__.update(functions)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _rebound(function: FunctionType, found: dict[str, None], depth: int) -> FunctionType:
    """`function` with ours in the place of the functions above, in what it calls too; `found` gets what they are."""
    package = (function.__module__ or "").split(".")[0]
    replaced: dict[str, Any] = {}
    used = _names(function.__code__)
    for name in used:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            attributes = {}
            for attribute in used:
                ours = _replacement(vars(value).get(attribute), found)
                if ours is not None:
                    attributes[attribute] = ours
            if attributes:
                replaced[name] = _Namespace(value, attributes)
        elif isinstance(value, FunctionType):
            ours = _replacement(value, found)
            if (
                ours is None
                and depth > 0
                and (value.__module__ or "").split(".")[0] == package
                and value is not function
            ):
                below: dict[str, None] = {}
                made = _rebound(value, below, depth - 1)
                ours = made if below else None
                found.update(below)
            if ours is not None:
                replaced[name] = ours
    if not replaced:
        return function
    code, closure = function.__code__, function.__closure__
    names = {**function.__globals__, **replaced}
    made = FunctionType(code, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    return made


def _names(code: CodeType) -> dict[str, None]:
    """Globals and attributes that a function uses, in its comprehensions and inner functions, too."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(_names(constant))
    return names


def _replacement(value: Any, found: dict[str, None]) -> Any:
    if not isinstance(value, FunctionType):
        return None
    entry = _FUNCTIONS.get(((value.__module__ or "").split(".")[0], value.__name__))
    if entry is None:
        return None
    found[entry[0]] = None
    return entry[1](value)


# ---- measuring ----


def time_parts(parts: list[Part], example: Example, exact: bool) -> None:
    """Times each part's methods as they are and as they would be, on what the model calls them with."""
    parts = [part for part in parts if part.changes_now and not part.rejected]

    def recorded(part: Part, name: str, *args: Any, **kwargs: Any) -> Any:
        before, after = (getattr(kind, name) for kind in (type(part.module), part.kind))
        own = _clone((args, kwargs))
        result = before(part.module, *args, **kwargs)
        if not part.called:
            swaps = Swaps()
            swaps.attach_part(part.module, part.kind, exact)

            # Methods may write into what they are given, so each call gets a copy, made before its clock starts.
            def timed(method: Callable[..., Any]) -> float:
                positional, named = _clone(own)
                swaps.set(method is after)
                example.synchronize()
                start = perf_counter()
                method(part.module, *positional, **named)
                example.synchronize()
                return perf_counter() - start

            def outputs(method: Callable[..., Any]) -> Outputs:
                positional, named = _clone(own)
                swaps.set(method is after)
                return list(tensors_in(method(part.module, *positional, **named)))

            try:
                with torch.no_grad():
                    part.difference = difference(outputs(before), outputs(after))[0]
                    part.before_ms, part.after_ms = interleaved_ms([lambda: timed(before), lambda: timed(after)])
            finally:
                swaps.undo()
            part.shape = next((tuple(t.shape) for _, t in tensors_in(own)), None)
            part.called = True
        return result

    try:
        for part in parts:
            for name in part.methods:
                part.module.__dict__[name] = functools.partial(recorded, part, name)
        example.run()
    finally:
        for part in parts:
            for name in part.methods:
                part.module.__dict__.pop(name, None)
