"""Valve filters beside torch's own operators: conv2d(image) * conv2d(region), ReLU behind it.

A first layer, as in Eppel's networks (3x3 on an image of three channels, to 64; and 7x7 with stride 2, as a ResNet
begins), and a deeper one, where the region gates features of 64 channels. Training takes the gradients of all
parameters, and in the deeper layer that of its input; there without ReLU, whose derivative at values that rounding
moves across zero is not to be compared. The floor is each input read once and each output written once.
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
TOLERANCE, SUMS_TOLERANCE = 1e-4, 5e-4  # the second: sums over all pixels of a batch, torch's too


@dataclass(frozen=True)
class Problem:
    layer: str
    images: int
    inputs: int
    outputs: int
    side: int
    kernel: int
    stride: int
    training: bool
    gradient_of_input: bool = False
    relu: bool = True
    quick: tuple[int, ...] = ()

    @property
    def way(self) -> str:
        return "forward+backward" if self.training else "forward"

    @property
    def padding(self) -> int:
        return self.kernel // 2


def cases() -> list[Case]:
    problems = []
    for training in (False, True):
        problems += [
            Problem("first layer", 8, 3, 64, 320, 3, 1, training, quick=(1, 2)),
            Problem("first layer", 8, 3, 64, 320, 7, 2, training),
            Problem("deeper layer", 8, 64, 64, 80, 3, 1, training, True, relu=not training, quick=(1, 2)),
        ]
    return [_case(problem) for problem in problems]


def _case(problem: Problem) -> Case:
    stride, padding, kernel = problem.stride, problem.padding, problem.kernel
    shape = (problem.images, problem.inputs, problem.side, problem.side)
    out = problem.side // stride
    outputs = problem.images * problem.outputs * out * out

    def theirs(
        image: Tensor, region: Tensor, weight: Tensor, valve: Tensor, bias: Tensor, valve_bias: Tensor
    ) -> Tensor:
        features = F.conv2d(image, weight, bias, stride, padding)
        gated = features * F.conv2d(region, valve, valve_bias, stride, padding)
        return gated.relu() if problem.relu else gated

    def build() -> Workload:
        from pyseg.functional import valve_conv2d

        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        image = drawn(*shape)
        region = (drawn(problem.images, 1, problem.side, problem.side) > 0).float()
        parameters = [
            drawn(problem.outputs, problem.inputs, kernel, kernel) / (problem.inputs * kernel * kernel) ** 0.5,
            drawn(problem.outputs, 1, kernel, kernel) / kernel,
            drawn(problem.outputs),
            drawn(problem.outputs),
        ]
        gradient = drawn(problem.images, problem.outputs, out, out)

        def ours(*tensors: Tensor) -> Tensor:
            return valve_conv2d(*tensors, stride, padding, relu=problem.relu)

        def call(
            function: Callable[..., Tensor], image: Tensor, tensors: list[Tensor], grad: Tensor
        ) -> Callable[[], Any]:
            own_region, *own = [each.to(image.dtype) for each in (region, *tensors)]
            if not problem.training:
                return lambda: function(image, own_region, *own)
            own = [each.detach().requires_grad_() for each in own]
            image = image.detach().requires_grad_(problem.gradient_of_input)
            wanted = [*([image] if problem.gradient_of_input else []), *own]

            def step() -> list[Tensor]:
                y = function(image, own_region, *own)
                return [y.detach(), *torch.autograd.grad(y, wanted, grad)]

            return step

        def prepare(function: Callable[..., Tensor], last: bool, compiled: bool = False) -> Prepared:
            format = torch.channels_last if last else torch.contiguous_format
            maps = [each.contiguous(memory_format=format) for each in (image, gradient)]
            run = call(torch.compile(function, dynamic=False) if compiled else function, maps[0], parameters, maps[1])
            run()
            return Prepared(run)

        def expected() -> list[Tensor]:
            with torch.inference_mode(False):
                result = call(theirs, image.double(), parameters, gradient.double())()
            return list(result) if isinstance(result, list) else [result]

        contenders = [
            Contender(BASELINE, lambda: prepare(theirs, False)),
            Contender("torch channels_last", lambda: prepare(theirs, True)),
            Contender("torch.compile NCHW", lambda: prepare(theirs, False, True)),
            Contender("torch.compile channels_last", lambda: prepare(theirs, True, True)),
            Contender("pyseg NCHW", lambda: prepare(ours, False), ours=True),
            Contender("pyseg channels_last", lambda: prepare(ours, True), ours=True),
        ]
        return Workload(contenders, expected)

    taps = (problem.inputs + 1) * kernel * kernel
    # Backward sums as many products for the parameters' gradients, and for the image's where it is asked for.
    passes = 1 + problem.training * (1 + problem.gradient_of_input * problem.inputs / (problem.inputs + 1))
    inputs = torch.Size(shape).numel()
    return Case(
        name=f"systems/valve_conv2d/{problem.way}/{problem.layer}/{kernel}x{kernel} stride {stride}/{list(shape)}",
        groups=(f"valve filters, {problem.layer}, {problem.way}",),
        build=build,
        params={"input": list(shape), "outputs": problem.outputs, "kernel": kernel, "stride": stride},
        baseline=BASELINE,
        tolerance=SUMS_TOLERANCE if problem.training else TOLERANCE,
        least=lambda: (int(2 * taps * outputs * passes), 4 * (inputs + outputs) * (1 + problem.training)),
        inference=not problem.training,
        quick=problem.quick,
    )
