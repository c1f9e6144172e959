"""The permutohedral lattice in ONNX operators: vertices and their neighbours by Unique.

Splitting space is arithmetic (Adams, Baek, Davis 2010, sections 3 and 4.1); the hash table becomes Unique on the
coordinates of all corners, packed into one int64 each, image first. Coordinates must fit into their share of the 63
bits: 2^10 to either side for five features (those of a photograph reach about 200), 2^15 for up to three. Six would
have 2^8, which a photograph with a fourth channel almost fills: its features are as long as 40, and coordinates reach
sqrt(2/3) (d + 1) times that. So more than five raise.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnxscript import INT16, INT32, INT64, ir
from onnxscript.onnx_opset import opset18

from pyseg.export.table import cannot

op: Any = opset18
Value = Any
_IMAGE_BITS, _MOST_BITS = 8, 16
_MOST_FEATURES = 5


def permutohedral_lattice(features: Value, scale: float, max_vertices: int) -> tuple[Value, ...]:
    """vertex, weight, row, entry, neighbour, offset, key, as the operator returns them on the CPU."""
    if max_vertices >= 0:
        raise cannot("permutohedral_lattice", f"max_vertices must be None, got {max_vertices}")
    d = int(features.shape[1])
    if d > _MOST_FEATURES:
        what = f'features must have at most {_MOST_FEATURES} dimensions (any number with accuracy="exact"), got {d}'
        raise cannot("permutohedral_lattice", what)
    if features.dtype != ir.DataType.DOUBLE:
        features = op.Cast(features, to=ir.DataType.FLOAT)
    dtype = np.float64 if features.dtype == ir.DataType.DOUBLE else np.float32
    corners, fraction, rank = _simplex(features, d, scale, dtype)

    # The vertex of remainder r: coordinate i is corners[i] + r, less d + 1 where rank[i] > d - r. [N, P, r, i]
    remainder = _constant(np.arange(d + 1).reshape(d + 1, 1))
    beyond = op.Greater(op.Unsqueeze(rank, _ints(2)), op.Sub(_constant(d), remainder))
    coordinates = op.Add(op.Unsqueeze(corners, _ints(2)), remainder)
    coordinates = op.Sub(coordinates, op.Mul(op.Cast(beyond, to=INT64.dtype), _constant(d + 1)))
    bits = min(_MOST_BITS, (63 - _IMAGE_BITS) // d)
    strides = _constant(np.array([1 << bits * (d - 1 - i) for i in range(d)] + [0]))
    middle = sum(1 << (bits * (d - 1 - i) + bits - 1) for i in range(d))
    image = op.Range(_constant(0), op.Squeeze(op.Shape(features, start=0, end=1)), _constant(1))
    image = op.Reshape(op.Mul(image, _constant(1 << bits * d)), _ints(-1, 1, 1))
    packed = op.Add(op.ReduceSum(op.Mul(coordinates, strides), _ints(3), keepdims=0), op.Add(image, _constant(middle)))

    vertices, _, inverse, _ = op.Unique(op.Reshape(packed, _ints(-1)), sorted=1)
    vertex = op.Cast(op.Reshape(inverse, op.Shape(packed)), to=INT32.dtype)
    weight = _weights(fraction, rank, d, dtype)
    fields = [op.Mod(op.Div(vertices, _constant(1 << bits * (d - 1 - i))), _constant(1 << bits)) for i in range(d)]
    key = op.Cast(op.Sub(_stacked(fields, 1), _constant(1 << bits - 1)), to=INT16.dtype)
    none = op.Constant(value=ir.tensor(np.zeros(0, np.int32)))
    neighbour = _neighbours(vertices, d, bits)
    return vertex, weight, none, none, neighbour, _offsets(features, vertices, bits * d), key


def _simplex(features: Value, d: int, scale: float, dtype: Any) -> tuple[Value, Value, Value]:
    """Corners of remainder zero, how far points are from them (in periods), and coordinates' ranks: [N, P, i]."""
    period = d + 1
    # In the kernels' order of operations: where a point lies on a side of its simplex, rounding says to which of two.
    factors = [scale * period * math.sqrt(2 / 3) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    scaled = op.Mul(op.Transpose(features, perm=[0, 2, 1]), _constant(np.array(factors, dtype)))
    columns = [op.Gather(scaled, _constant(i), axis=2) for i in range(d)]
    total, coordinates = columns[-1], [op.Mul(columns[-1], _constant(dtype(-d)))]
    for j in range(d - 1, 0, -1):
        coordinates.append(op.Sub(total, op.Mul(columns[j - 1], _constant(dtype(j)))))
        total = op.Add(total, columns[j - 1])
    elevated = _stacked([total, *reversed(coordinates)], 2)
    periods = op.Round(op.Mul(elevated, _constant(dtype(1) / dtype(period))))
    base = op.Mul(periods, _constant(dtype(period)))
    behind = op.Sub(base, elevated)
    one, other = op.Unsqueeze(behind, _ints(3)), op.Unsqueeze(behind, _ints(2))  # [N, P, i, 1], [N, P, 1, j]
    earlier = _constant(np.tri(period, k=-1).astype(bool))
    before = op.Or(op.Less(other, one), op.And(op.Equal(other, one), earlier))
    corners = op.Cast(base, to=INT64.dtype)
    total = op.ReduceSum(corners, _ints(2), keepdims=1)  # a multiple of the period
    rank = op.Add(op.ReduceSum(op.Cast(before, to=INT64.dtype), _ints(3), keepdims=0), op.Div(total, _constant(period)))
    up = op.Cast(op.Less(rank, _constant(0)), to=INT64.dtype)
    down = op.Cast(op.Greater(rank, _constant(d)), to=INT64.dtype)
    turn = op.Mul(op.Sub(up, down), _constant(period))
    corners, rank = op.Add(corners, turn), op.Add(rank, turn)
    fraction = op.Div(op.Sub(elevated, op.CastLike(corners, elevated)), _constant(dtype(period)))
    return corners, fraction, rank


def _weights(fraction: Value, rank: Value, d: int, dtype: Any) -> Value:
    """With b the fractions by rank and b[d + 1] = b[0] - 1: the weight of remainder r is b[d - r] - b[d - r + 1]."""
    by_rank = op.ScatterElements(fraction, rank, fraction, axis=2)
    wrapped = op.Sub(op.Gather(by_rank, _ints(0), axis=2), _constant(dtype(1)))
    falling = op.Concat(by_rank, wrapped, axis=2)
    places = np.arange(d, -1, -1)
    return op.Sub(op.Gather(falling, _constant(places), axis=2), op.Gather(falling, _constant(places + 1), axis=2))


def _neighbours(vertices: Value, d: int, bits: int) -> Value:
    """[d + 1, M, 2] int32: one step up and down each direction is a fixed difference of packed coordinates."""
    steps = []
    for direction in range(d + 1):
        step = sum((-d if i == direction else 1) << bits * (d - 1 - i) for i in range(d))
        steps.append([step, -step])
    wanted = op.Add(op.Reshape(vertices, _ints(1, -1, 1)), _constant(np.array(steps).reshape(d + 1, 1, 2)))
    count = op.Shape(vertices)
    known, _, place, _ = op.Unique(op.Concat(vertices, op.Reshape(wanted, _ints(-1)), axis=0), sorted=1)
    numbers = op.Range(_constant(0), op.Squeeze(count), _constant(1))
    number = op.Expand(_constant(-1), op.Shape(known))  # of what is wanted; -1 where it is no vertex
    number = op.ScatterElements(number, op.Slice(place, _ints(0), count, _ints(0)), numbers)
    found = op.Gather(number, op.Slice(place, count, op.Shape(place), _ints(0)))
    return op.Cast(op.Reshape(found, op.Shape(wanted)), to=INT32.dtype)


def _offsets(features: Value, vertices: Value, bits: int) -> Value:
    """[N + 1]: the number of vertices of earlier images."""
    image = op.Div(vertices, _constant(1 << bits))
    images = op.Squeeze(op.Shape(features, start=0, end=1))
    numbers = op.Range(_constant(0), op.Add(images, _constant(1)), _constant(1))
    earlier = op.Less(op.Unsqueeze(image, _ints(0)), op.Unsqueeze(numbers, _ints(1)))
    return op.ReduceSum(op.Cast(earlier, to=INT64.dtype), _ints(1), keepdims=0)


def _stacked(values: Sequence[Value], axis: int) -> Value:
    return op.Concat(*[op.Unsqueeze(value, _ints(axis)) for value in values], axis=axis)


def _constant(value: Any) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(value)))


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))
