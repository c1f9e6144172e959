"""A sentence's vector and coordinates fused into a map: fuse_query beside the convolution of the tiled concatenation.

The first size is that of Hu et al. 2016 (1603.06180): 1000 channels each of map and sentence to 500, here at 40x40; the
second that of examples/referring_expressions.py. The peers tile the vector, make the concatenation and convolve it, as
the authors do; where it is said, both normalise map and vector first. The floor counts what is needed without the
tiled tensor: one product with the map, each map read and written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch NCHW"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Problem:
    images: int
    side: int
    channels: int  # of the map and of the vector
    outputs: int
    normalize: bool
    training: bool
    quick: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        way = "forward+backward" if self.training else "forward"
        size = f"{self.images}x{self.side}x{self.side}, {self.channels}+{self.channels}+8 to {self.outputs}"
        return f"systems/fuse_query/{way}/{size}{', normalised' if self.normalize else ''}"


def cases() -> list[Case]:
    problems = []
    for training in (False, True):
        problems += [Problem(1, 40, 1000, 500, normalize, training, (1, 2)) for normalize in (False, True)]
        problems.append(Problem(32, 16, 64, 64, True, training))
    return [_case(problem) for problem in problems]


def _case(problem: Problem) -> Case:
    def build() -> Workload:
        from pyseg._ops.fuse_query import pixel_coordinates
        from pyseg.functional import fuse_query

        p = problem
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(p.images, p.channels, p.side, p.side, generator=generator)
        q = torch.randn(p.images, p.channels, generator=generator)
        weight = torch.randn(p.outputs, 2 * p.channels + 8, 1, 1, generator=generator) / p.channels**0.5
        bias = torch.randn(p.outputs, generator=generator)
        grad = torch.randn(p.images, p.outputs, p.side, p.side, generator=generator)

        def tiled(pixels: Tensor) -> Callable[..., Tensor]:
            def function(x: Tensor, q: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                if p.normalize:
                    x, q = F.normalize(x, dim=1), F.normalize(q, dim=1)
                maps = [q[:, :, None, None].expand(-1, -1, p.side, p.side), pixels.expand(p.images, -1, -1, -1)]
                return F.conv2d(torch.cat([x, *maps], 1), weight, bias).relu()

            return function

        def ours(*arguments: Tensor) -> Tensor:
            return fuse_query(*arguments, normalize=p.normalize, relu=True)

        def call(function: Callable[..., Tensor], arguments: list[Tensor], grad: Tensor) -> Callable[[], Any]:
            if not p.training:
                return lambda: function(*arguments)
            leaves = [t.detach().requires_grad_() for t in arguments]

            def step() -> list[Tensor]:
                y = function(*leaves)
                return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

            return step

        def prepare(function: Callable[..., Tensor], last: bool, compiled: bool = False) -> Prepared:
            layout = torch.channels_last if last else torch.contiguous_format
            own = [x.contiguous(memory_format=layout), q, weight, bias]
            run = call(
                torch.compile(function, dynamic=False) if compiled else function,
                own,
                grad.contiguous(memory_format=layout),
            )
            run()
            return Prepared(run)

        def expected() -> list[Tensor]:
            with torch.inference_mode(False):
                pixels = pixel_coordinates(p.side, p.side, torch.float64)
                result = call(tiled(pixels), [t.double() for t in (x, q, weight, bias)], grad.double())()
            return list(result) if isinstance(result, list) else [result]

        theirs = tiled(pixel_coordinates(p.side, p.side, torch.float32))
        contenders = [
            Contender(BASELINE, lambda: prepare(theirs, False)),
            Contender("torch channels_last", lambda: prepare(theirs, True)),
            Contender("torch.compile NCHW", lambda: prepare(theirs, False, True)),
            Contender("torch.compile channels_last", lambda: prepare(theirs, True, True)),
            Contender("pyseg NCHW", lambda: prepare(ours, False), ours=True),
            Contender("pyseg channels_last", lambda: prepare(ours, True), ours=True),
        ]
        return Workload(contenders, expected)

    pixels = problem.images * problem.side**2
    products = 3 if problem.training else 1
    flops = 2 * products * pixels * problem.channels * problem.outputs
    elements = pixels * (problem.channels + problem.outputs) * (2 if problem.training else 1)
    return Case(
        name=problem.name,
        groups=("sentence and map fused, " + ("forward+backward" if problem.training else "forward"),),
        build=build,
        params={"map": [problem.images, problem.channels, problem.side, problem.side], "dtype": "float32"},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (flops, 4 * elements),
        inference=not problem.training,
        quick=problem.quick,
    )
