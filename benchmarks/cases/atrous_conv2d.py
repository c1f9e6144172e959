"""atrous_conv2d: 3x3 convolutions at the sizes of DeepLab's ASPP, of U2-Net and of Xception's and MobileNet's depthwise
layers, beside torch's in both layouts, with a weight prepacked for oneDNN, and compiled."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import Case, Contender, Prepared, Workload
from peers import channels_last, compiled_for_inference

BASELINE = "torch NCHW"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3}  # 4e-3: one rounding of the result to 8 bits
FAMILY_NOTES = {  # measured reasons, by the summary's row
    "depthwise, rates above 1, forward": "oneDNN has a fast depthwise kernel for small rates, 2.3 to 5 times the "
    "floor, so 8x over it would lie below one read and one write of the map; from rate 12 on it has none",
    "depthwise, rate 1, forward": "the fastest peer takes 1.1 (AVX-512) to 3.3 (AVX2) times the floor of one read and "
    "one write from a cache; NCHW rows of 65 pixels are unaligned vectors, two cache accesses each",
    "dense, forward+backward": "with AVX-512 the transforms, which the caches bound, are a quarter of the time, with "
    "AVX2 a sixth",
    "dense, forward": "at 33x33 rate 36 is one tap for most pixels: both sides are at the speed of a matrix product",
}


@dataclass(frozen=True)
class Shape:
    """A 3x3 convolution of stride 1 whose output has the size of its input."""

    channels_in: int
    channels_out: int
    size: int  # height and width
    rate: int  # dilation and padding
    batch: int = 1
    depthwise: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def groups(self) -> int:
        return self.channels_in if self.depthwise else 1

    @property
    def flops(self) -> int:
        along_one_axis = self.size + 2 * max(self.size - self.rate, 0)  # the taps that lie inside the map
        return 2 * self.batch * self.channels_in * self.channels_out // self.groups * along_one_axis**2

    @property
    def map_bytes(self) -> tuple[int, int]:
        pixels = self.batch * self.size**2 * self.dtype.itemsize
        return pixels * self.channels_in, pixels * self.channels_out

    @property
    def weight_bytes(self) -> int:
        return 9 * self.channels_in // self.groups * self.channels_out * self.dtype.itemsize

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, 1, self.rate, self.rate, self.groups)

    def arguments(self) -> dict:
        return {"kernel_size": 3, "padding": self.rate, "dilation": self.rate, "groups": self.groups}


def cases() -> list[Case]:
    return [
        case
        for shape, family, details in _shapes()
        for case in (_forward(shape, family, details), _training(shape, family, details))
        if case is not None
    ]


def _shapes() -> list[tuple[Shape, str, list[str]]]:
    """Shape, family and the family's further rows in the summary."""
    shapes: list[tuple[Shape, str, list[str]]] = []
    for channels, size, batch, rate in itertools.product((2048, 256), (33, 65), (1, 4), (6, 12, 18, 24, 36)):
        rates = "rates 6 and 12" if rate <= 12 else "rates 18 to 36"
        shapes.append((Shape(channels, 256, size, rate, batch), "dense", [rates]))
    for channels, (size, rate) in itertools.product(
        (64, 16), [(320, 1), (160, 1), *itertools.product((40, 20), (1, 2, 4, 8))]
    ):
        shapes.append((Shape(channels, channels, size, rate), "U2-Net", ["rate 1" if rate == 1 else "rates above 1"]))
    for channels, size, rate in itertools.product((256, 728, 1536, 2048), (65, 60), (1, 2, 4, 8, 12)):
        family = "depthwise, rate 1" if rate == 1 else "depthwise, rates above 1"
        shapes.append((Shape(channels, channels, size, rate, depthwise=True), family, []))
    shapes.append((Shape(2048, 256, 33, 12, dtype=torch.bfloat16), "dense bfloat16", []))
    return shapes


# The quick run: every family, each kind of contender, small and large maps, phases from wide to vanishing.
# (channels in, size, rate, batch, depthwise) to the numbers of threads.
QUICK_FORWARD = {
    (2048, 33, 6, 1, False): (1,),
    (2048, 33, 12, 1, False): (1, 2),
    (2048, 33, 18, 1, False): (1,),
    (2048, 33, 36, 1, False): (1,),
    (2048, 65, 12, 1, False): (1,),
    (2048, 65, 24, 1, False): (1,),
    (256, 33, 12, 1, False): (1,),
    (256, 65, 6, 1, False): (1, 2),
    (256, 33, 18, 4, False): (1,),
    (64, 320, 1, 1, False): (1, 2),
    (64, 40, 2, 1, False): (1,),
    (64, 20, 8, 1, False): (1,),
    (16, 160, 1, 1, False): (1,),
    (16, 40, 4, 1, False): (1,),
    (256, 65, 1, 1, True): (1,),
    (728, 60, 2, 1, True): (1, 2),
    (1536, 65, 4, 1, True): (1,),
    (2048, 65, 12, 1, True): (1,),
}
QUICK_TRAINING = {
    (2048, 33, 12, 1, False): (1, 2),
    (2048, 33, 36, 1, False): (1,),
    (256, 65, 6, 1, False): (1,),
    (64, 40, 2, 1, False): (1,),
    (256, 65, 2, 1, True): (1, 2),
    (728, 60, 1, 1, True): (1,),
    (2048, 65, 12, 1, True): (1,),
}


def _key(shape: Shape) -> tuple:
    return shape.channels_in, shape.size, shape.rate, shape.batch, shape.depthwise


def _name(shape: Shape, direction: str) -> str:
    kind = "depthwise" if shape.depthwise else "dense"
    channels = f"{shape.channels_in}" if shape.depthwise else f"{shape.channels_in}-{shape.channels_out}"
    name = f"atrous_conv2d/{kind}/{direction}/{channels}/{shape.size}x{shape.size}/rate{shape.rate}/batch{shape.batch}"
    return name if shape.dtype == torch.float32 else f"{name}/{_dtype_name(shape.dtype)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _params(shape: Shape) -> dict:
    return {
        "input": [shape.batch, shape.channels_in, shape.size, shape.size],
        "weight": [shape.channels_out, shape.channels_in // shape.groups, 3, 3],
        "rate": shape.rate,
        "groups": shape.groups,
        "dtype": _dtype_name(shape.dtype),
    }


def _groups(family: str, direction: str, details: list[str]) -> tuple[str, ...]:
    head = f"{family}, {direction}"
    return (head, *(f"{head}, {detail}" for detail in details))


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output: of the sizes that a normalised network has."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(shape.dtype)

    fan_in = 9 * shape.channels_in // shape.groups
    x = normal(shape.batch, shape.channels_in, shape.size, shape.size)
    weight = normal(shape.channels_out, shape.channels_in // shape.groups, 3, 3) / fan_in**0.5
    grad = normal(shape.batch, shape.channels_out, shape.size, shape.size)
    return x, weight, normal(shape.channels_out), grad


# ---- forward ----


def _forward(shape: Shape, family: str, details: list[str]) -> Case:
    def build() -> Workload:
        x, weight, bias, _ = _inputs(shape)

        def expected() -> list[Tensor]:
            return [shape.conv(x.double(), weight.double(), bias.double())]

        contenders = _forward_peers(shape, x, weight, bias)
        contenders += [
            Contender("pyseg channels_last", lambda: _pyseg_forward(shape, channels_last(x), weight, bias), ours=True),
            Contender("pyseg NCHW", lambda: _pyseg_forward(shape, x, weight, bias), ours=True),
        ]
        return Workload(contenders, expected)

    bytes_in, bytes_out = shape.map_bytes
    quick = QUICK_FORWARD.get(_key(shape), ()) if shape.dtype == torch.float32 else (1,)
    return Case(
        name=_name(shape, "forward"),
        groups=_groups(family, "forward", details),
        build=build,
        params=_params(shape),
        baseline=BASELINE,
        tolerance=TOLERANCE[shape.dtype],
        least=lambda: (shape.flops, bytes_in + shape.weight_bytes + bytes_out),
        quick=quick,
    )


def _forward_peers(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> list[Contender]:
    def eager(x: Tensor, weight: Tensor) -> Prepared:
        return Prepared(lambda: shape.conv(x, weight, bias))

    def cast(x: Tensor, weight: Tensor) -> Prepared:
        dtype, weight32, bias32 = shape.dtype, weight.float(), bias.float()
        cached = weight32.nbytes + bias32.nbytes
        return Prepared(lambda: shape.conv(x.float(), weight32, bias32).to(dtype), cached)

    def compiled(x: Tensor) -> Prepared:
        module = _module(nn.Conv2d, shape, weight, bias)
        call = compiled_for_inference(module, x)
        return Prepared(lambda: call(x), weight.nbytes)

    peers = [
        Contender(BASELINE, lambda: eager(x, weight)),
        Contender("torch channels_last", lambda: eager(channels_last(x), channels_last(weight))),
    ]
    if shape.dtype == torch.float32:
        peers += [
            Contender("oneDNN prepacked", lambda: _prepacked(shape, channels_last(x), weight, bias)),
        ]
    else:
        peers += [
            Contender("cast to float32 and back, NCHW", lambda: cast(x, weight)),
            Contender("cast to float32 and back, channels_last", lambda: cast(channels_last(x), channels_last(weight))),
        ]
    return peers + [
        Contender("torch.compile NCHW", lambda: compiled(x)),
        Contender("torch.compile channels_last", lambda: compiled(channels_last(x))),
    ]


def _module(kind: type[nn.Conv2d], shape: Shape, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    module = kind(shape.channels_in, shape.channels_out, **shape.arguments(), dtype=shape.dtype).eval()
    module.load_state_dict({"weight": weight, "bias": bias})
    return module.requires_grad_(False)


def _prepacked(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> Prepared:
    """The weight in the layout that oneDNN asks for at this shape, as inductor's freezing does it."""
    one, rate = [1, 1], [shape.rate, shape.rate]
    # The operators take padding, stride, dilation and padding, stride, dilation: both in this order.
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), rate, one, rate, shape.groups, list(x.shape))
    pointwise = torch.ops.mkldnn._convolution_pointwise.default
    call = lambda: pointwise(x, packed, bias, rate, one, rate, shape.groups, "none", [], "")  # noqa: E731
    return Prepared(call, weight.nbytes)


def _pyseg_forward(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> Prepared:
    from pyseg.nn import AtrousConv2d

    module = _module(AtrousConv2d, shape, weight, bias)
    plan = module.plan(tuple(x.shape))
    packed = 0 if shape.depthwise else torch.ops.pyseg._atrous_conv2d_pack(module.weight).nbytes
    return Prepared(lambda: module(x), packed, plan.path)


# ---- forward and backward, with the gradients of input and weight ----


def _training(shape: Shape, family: str, details: list[str]) -> Case | None:
    if shape.dtype != torch.float32:
        return None

    def build() -> Workload:
        x, weight, _, grad = _inputs(shape)

        def expected() -> list[Tensor]:
            return _step(lambda x, weight: shape.conv(x, weight, None), x.double(), weight.double(), grad.double())()

        def eager(x: Tensor, weight: Tensor, grad: Tensor) -> Prepared:
            return Prepared(_step(lambda x, weight: shape.conv(x, weight, None), x, weight, grad))

        def compiled(x: Tensor, weight: Tensor, grad: Tensor) -> Prepared:
            conv = torch.compile(lambda x, weight: shape.conv(x, weight, None), dynamic=False)
            step = _step(conv, x, weight, grad)
            step()
            return Prepared(step)

        def ours(x: Tensor, weight: Tensor, grad: Tensor) -> Prepared:
            return _pyseg_training(shape, x, weight, grad)

        nchw, last = (x, weight, grad), (channels_last(x), channels_last(weight), channels_last(grad))
        last_map_only = (last[0], weight, last[2])
        return Workload(
            [
                Contender(BASELINE, lambda: eager(*nchw)),
                Contender("torch channels_last", lambda: eager(*last)),
                Contender("torch.compile NCHW", lambda: compiled(*nchw)),
                Contender("torch.compile channels_last", lambda: compiled(*last)),
                Contender("pyseg channels_last", lambda: ours(*last_map_only), ours=True),
                Contender("pyseg NCHW", lambda: ours(*nchw), ours=True),
            ],
            expected,
        )

    bytes_in, bytes_out = shape.map_bytes
    return Case(
        name=_name(shape, "training"),
        groups=_groups(family, "forward+backward", details),
        build=build,
        params=_params(shape),
        baseline=BASELINE,
        tolerance=TOLERANCE[shape.dtype],
        # Forward x, weight, y; backward x, weight, the gradient of y, and the two results.
        least=lambda: (3 * shape.flops, 3 * bytes_in + 3 * shape.weight_bytes + 2 * bytes_out),
        inference=False,
        quick=QUICK_TRAINING.get(_key(shape), ()),
    )


def _step(
    conv: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor
) -> Callable[[], list[Tensor]]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def step() -> list[Tensor]:
        y = conv(x, weight)
        return [y, *torch.autograd.grad(y, (x, weight), grad)]

    return step


def _pyseg_training(shape: Shape, x: Tensor, weight: Tensor, grad: Tensor) -> Prepared:
    from pyseg.functional import atrous_conv2d
    from pyseg.nn import AtrousConv2d

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return atrous_conv2d(x, weight, None, 1, shape.rate, shape.rate, shape.groups)

    module = AtrousConv2d(shape.channels_in, shape.channels_out, **shape.arguments(), bias=False, dtype=shape.dtype)
    return Prepared(_step(conv, x, weight, grad), path=module.plan(tuple(x.shape)).path)
