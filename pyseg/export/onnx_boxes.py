"""The operators on boxes in ONNX's own: RoiAlign and NonMaxSuppression."""

from collections.abc import Sequence
from typing import Any

from onnxscript import FLOAT, INT64
from onnxscript.onnx_opset import opset18

from pyseg.export.boxes import level_limits
from pyseg.export.table import cannot

op: Any = opset18
Value = Any  # of the ONNX graph
_LOWEST = -3.4e38  # the scores of boxes of other classes are -infinity: below what is kept at all


def roi_align(
    input: Value,
    boxes: Value,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Value:
    """RoiAlign in float32."""
    maps, rows = op.Cast(input, to=FLOAT.dtype), op.Cast(boxes, to=FLOAT.dtype)
    pooled = _aligned("roi_align", maps, rows, output_size, spatial_scale, sampling_ratio, aligned, mode)
    return op.CastLike(pooled, input)


def multiscale_roi_align(
    features: Sequence[Value],
    boxes: Value,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
    least_level: int,
    most_level: int,
    canonical_size: float,
    canonical_level: float,
    epsilon: Sequence[float],
) -> Value:
    """The boxes of each level are gathered, pooled, and scattered into zeros."""
    rows = op.Cast(boxes, to=FLOAT.dtype)
    x1, y1, x2, y2 = (op.Gather(rows, op.Constant(value_int=column), axis=1) for column in range(1, 5))
    area = op.Mul(op.Sub(x2, x1), op.Sub(y2, y1))
    size = op.Sqrt(op.Max(area, op.Constant(value_float=0.0)))
    ratio = op.Add(
        op.Div(size, op.Constant(value_float=float(canonical_size))), op.Constant(value_float=float(epsilon[0]))
    )
    level = op.Cast(op.GreaterOrEqual(area, op.Constant(value_float=0.0)), to=INT64.dtype)  # 0: none, 1: the least
    for limit in level_limits(least_level, most_level, canonical_level, epsilon[1]):
        above = op.GreaterOrEqual(ratio, op.Constant(value_float=limit))
        level = op.Add(level, op.Mul(op.Cast(above, to=INT64.dtype), op.Min(level, op.Constant(value_int=1))))
    whole = op.Concat(op.Shape(rows, start=0, end=1), op.Shape(features[0], start=1, end=2), _ints(output_size), axis=0)
    result = op.Expand(op.Constant(value_float=0.0), whole)
    for number, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True), start=1):
        mine = op.NonZero(op.Equal(level, op.Constant(value_int=number)))  # [1, k]
        chosen = op.Gather(rows, op.Squeeze(mine, _ints([0])), axis=0)
        maps = op.Cast(feature, to=FLOAT.dtype)
        name = "multiscale_roi_align"
        pooled = _aligned(name, maps, chosen, output_size, scale, sampling_ratio, aligned, mode)
        result = op.ScatterND(result, op.Transpose(mine, perm=[1, 0]), pooled)
    return op.CastLike(result, features[0])


def _aligned(
    name: str,
    maps: Value,
    rows: Value,
    output_size: Sequence[int],
    scale: float,
    ratio: int,
    aligned: bool,
    mode: str,
) -> Value:
    """RoiAlign. Its mode "max" is not the maximum over points, so that is a RoiAlign of every point and a MaxPool."""
    if mode == "max" and ratio <= 0:
        raise cannot(name, f'sampling_ratio must be positive for mode "max", got {ratio}')
    points = ratio if mode == "max" else 1
    height, width = (int(bins) * points for bins in output_size)
    pooled = op.RoiAlign(
        maps,
        op.Slice(rows, _ints([1]), _ints([5]), _ints([1])),
        op.Cast(op.Gather(rows, op.Constant(value_int=0), axis=1), to=INT64.dtype),
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        mode="avg",
        output_height=height,
        output_width=width,
        sampling_ratio=1 if mode == "max" else max(ratio, 0),
        spatial_scale=float(scale),
    )
    if mode == "max":
        pooled, _ = op.MaxPool(pooled, kernel_shape=[points, points], strides=[points, points])
    return pooled


# ---- suppression ----


def nms(boxes: Value, scores: Value, idxs: Value | None, iou_threshold: float) -> Value:
    """NonMaxSuppression; with idxs each class is one of its classes, and what is left is sorted by score again.

    Numbers of classes are made dense by Unique. Boxes of other classes get a score of -infinity, which is not kept.
    """
    corners = op.Unsqueeze(op.Cast(boxes, to=FLOAT.dtype), _ints([0]))
    values = op.Unsqueeze(op.Cast(scores, to=FLOAT.dtype), _ints([0]))  # [1, K]
    every = op.Shape(boxes, start=0, end=1)
    overlap = op.Constant(value_floats=[float(iou_threshold)])
    if idxs is None:
        selected = op.NonMaxSuppression(corners, op.Unsqueeze(values, _ints([0])), every, overlap)
        return _column(selected)
    classes, _, place, _ = op.Unique(idxs, sorted=1)
    numbers = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(classes)), op.Constant(value_int=1))
    own = op.Equal(op.Unsqueeze(numbers, _ints([1])), op.Unsqueeze(place, _ints([0])))  # [G, K]
    of_class = op.Where(own, values, op.Constant(value_float=float("-inf")))
    lowest = op.Constant(value_floats=[_LOWEST])
    selected = op.NonMaxSuppression(corners, op.Unsqueeze(of_class, _ints([0])), every, overlap, lowest)
    rows = _column(selected)
    count = op.Shape(rows)
    # By row first: of equal scores TopK then puts the first row first.
    rows, _ = op.TopK(rows, count, largest=0)
    _, order = op.TopK(op.Gather(op.Squeeze(values, _ints([0])), rows), count)
    return op.Gather(rows, order)


def nms_padded(boxes: Value, scores: Value, idxs: Value | None, iou_threshold: float) -> tuple[Value, Value]:
    """The rows of `nms`, padded, and their number."""
    rows = nms(boxes, scores, idxs, iou_threshold)
    count = op.Shape(rows)
    missing = op.Sub(op.Shape(boxes, start=0, end=1), count)
    padded = op.Pad(rows, op.Concat(_ints([0]), missing, axis=0), op.Constant(value_int=-1))
    return padded, op.Squeeze(count)


def _column(selected: Value) -> Value:
    """The box of each (batch, class, box)."""
    return op.Gather(selected, op.Constant(value_int=2), axis=1)


def _ints(values: Sequence[int]) -> Value:
    return op.Constant(value_ints=[int(value) for value in values])
