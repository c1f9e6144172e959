"""Interpolation, concatenation and Joint Pyramid Upsampling's depthwise filters beside torch's own operators.

JPU's front as in FastFCN at an image of 480x480: three maps of 512 channels, 60x60, 30x30 and 15x15, four depthwise
convolutions of rates 1, 2, 4 and 8 and their batch norms in eval mode; the peers upsample, concatenate, convolve and
normalise. The floor is each input read once and each output written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch NCHW"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row
TOLERANCE = 1e-4  # torch's coordinates are in float32
DILATIONS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Problem:
    name: str
    group: str
    shapes: tuple[tuple[int, ...], ...]  # of the maps
    outputs: int  # elements
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    filters: bool = False
    training: bool = False
    quick: tuple[int, ...] = ()


def cases() -> list[Case]:
    return [_case(problem) for problem in _problems()]


def _problems() -> list[Problem]:
    from pyseg import functional

    def bilinear(size: int, align: bool) -> dict[str, Callable[..., Any]]:
        return {
            "theirs": lambda maps: F.interpolate(maps[0], (size, size), mode="bilinear", align_corners=align),
            "ours": lambda maps: functional.bilinear_upsample(maps[0], (size, size), align_corners=align),
        }

    def concat(maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        up = [F.interpolate(m, size, mode="bilinear", align_corners=True) for m in maps[1:]]
        return torch.cat([maps[0], *up], 1)

    def depthwise(maps: list[Tensor], weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = concat(maps)
        channels, outputs = x.shape[1], []
        mean, var = torch.zeros(channels), torch.ones(channels)
        for r, d in enumerate(DILATIONS):
            y = F.conv2d(x, weight[r].unsqueeze(1), None, 1, d, d, channels)
            outputs.append(F.batch_norm(y, mean, var, scale[r], shift[r], False, 0.0, 0.0))
        return outputs

    def ours(maps: list[Tensor], weight: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
        return list(functional.upsample_concat_depthwise(maps, weight, DILATIONS, scale=scale, shift=shift).unbind(0))

    def pyramid(channels: int, side: int, images: int = 1) -> tuple[tuple[int, ...], ...]:
        return tuple((images, channels, side >> level, side >> level) for level in range(3))

    problems = []
    for training in (False, True):
        way = "forward+backward" if training else "forward"
        for side, images in ((60, 1), (60, 4), (128, 1)):
            sizes = f"{images}x512x3 channels/{side}x{side}"
            outputs = images * 3 * 512 * side * side
            common = {"shapes": pyramid(512, side, images), "training": training}
            quick = (1, 2) if side == 60 and images == 1 else ()
            problems.append(
                Problem(
                    f"upsample/concat_depthwise/{way}/{sizes}",
                    f"JPU's upsampling and depthwise filters, {way}",
                    outputs=4 * outputs,
                    theirs=depthwise,
                    ours=ours,
                    filters=True,
                    quick=quick,
                    **common,
                )
            )
            problems.append(
                Problem(
                    f"upsample/concat/{way}/{sizes}",
                    f"upsampling and concatenation, {way}",
                    outputs=outputs,
                    theirs=concat,
                    ours=functional.upsample_concat,
                    quick=quick,
                    **common,
                )
            )
        for channels, side, size, align in ((21, 65, 520, False), (256, 33, 129, False), (2048, 1, 65, True)):
            problems.append(
                Problem(
                    f"upsample/bilinear/{way}/{channels} channels/{side}x{side} to {size}x{size}",
                    f"bilinear upsampling, {way}",
                    ((1, channels, side, side),),
                    channels * size * size,
                    **bilinear(size, align),
                    training=training,
                    quick=(1, 2) if channels < 2048 else (),
                )
            )
    return problems


def _case(problem: Problem) -> Case:
    def build() -> Workload:
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(shape, generator=generator) for shape in problem.shapes]
        channels = sum(shape[1] for shape in problem.shapes)
        filters = []
        if problem.filters:
            shapes = ((4, channels, 3, 3), (4, channels), (4, channels))
            filters = [torch.randn(shape, generator=generator) for shape in shapes]

        def call(function: Callable[..., Any], maps: list[Tensor], filters: list[Tensor]) -> Callable[[], Any]:
            if not problem.training:
                return lambda: function(maps, *filters)
            maps, filters = ([t.detach().requires_grad_() for t in group] for group in (maps, filters))

            def step() -> list[Tensor]:
                outputs = function(maps, *filters)
                outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
                grads = [_gradient(y) for y in outputs]
                return list(torch.autograd.grad(outputs, [*maps, *filters], grads))

            return step

        gradients: dict[tuple[Any, ...], Tensor] = {}

        def _gradient(y: Tensor) -> Tensor:  # made once: its making is no part of the step
            key = (y.shape, y.stride(), y.dtype)
            if key not in gradients:
                values = torch.randn(y.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(1)).to(
                    y.dtype
                )
                gradients[key] = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).copy_(values)
            return gradients[key]

        def prepare(function: Callable[..., Any], last: bool, compiled: bool = False) -> Prepared:
            own = [m.contiguous(memory_format=torch.channels_last) for m in maps] if last else maps
            run = call(torch.compile(function, dynamic=False) if compiled else function, own, filters)
            run()
            return Prepared(run)

        def expected() -> list[Tensor]:
            with torch.inference_mode(False):
                doubles = [m.double() for m in maps], [f.double() for f in filters]
                default = torch.get_default_dtype()
                torch.set_default_dtype(torch.float64)  # of the batch norms' buffers
                try:
                    result = call(problem.theirs, *doubles)()
                finally:
                    torch.set_default_dtype(default)
            return list(result) if isinstance(result, list | tuple) else [result]

        contenders = [
            Contender(BASELINE, lambda: prepare(problem.theirs, False)),
            Contender("torch channels_last", lambda: prepare(problem.theirs, True)),
            Contender("torch.compile NCHW", lambda: prepare(problem.theirs, False, True)),
            Contender("torch.compile channels_last", lambda: prepare(problem.theirs, True, True)),
            Contender("pyseg NCHW", lambda: prepare(problem.ours, False), ours=True),
            Contender("pyseg channels_last", lambda: prepare(problem.ours, True), ours=True),
        ]
        return Workload(contenders, expected)

    inputs = sum(torch.Size(shape).numel() for shape in problem.shapes)
    passes = 2 if problem.training else 1  # backward reads the outputs' gradients and writes the inputs'
    # Nine multiply-adds an output; backward as many for each of the two gradients.
    flops = 18 * problem.outputs * (3 if problem.training else 1) * problem.filters
    return Case(
        name=problem.name,
        groups=(problem.group,),
        build=build,
        params={"maps": [list(shape) for shape in problem.shapes], "dtype": "float32"},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (flops, 4 * passes * (inputs + problem.outputs)),
        inference=not problem.training,
        quick=problem.quick,
    )
