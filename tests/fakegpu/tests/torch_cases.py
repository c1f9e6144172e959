"""What torch's own machinery does on the fake GPU with fakegpu_torch installed. Run as cases.py."""

import ctypes
import json
import sys
import threading

import fakegpu_torch
import pytest
import torch
from case import case, close, equal, rand, run_cases

# isort: split
import fakegpu_test as ext  # after torch, whose libraries it needs

fakegpu_torch.install()


@case
def aten_operators():
    c = rand(4, 6)
    x = c.cuda()
    close(x.half().float(), c.half().float())
    equal(x.t().contiguous(), c.t().contiguous())
    close(x.sum(), c.sum())
    values, indices = x.sort(dim=1)
    equal(values, c.sort(dim=1).values)
    equal(indices, c.sort(dim=1).indices)
    equal(torch.cat([x, x]), torch.cat([c, c]))
    equal(x[x > 0], c[c > 0])
    assert torch.equal(x, x.clone())
    assert not torch.equal(x, x + 1)
    assert "cuda" in repr(x)


@case
def views_inplace_and_out():
    c = rand(4, 6)
    x = c.cuda()
    x[:, 1:3] += 5
    c[:, 1:3] += 5
    x[x > 5] = 0
    c[c > 5] = 0
    equal(x, c)
    x.t()[2].mul_(3)
    c.t()[2].mul_(3)
    equal(x, c)
    view = x[1:3, ::2]
    torch.add(view, view, out=view)
    c[1:3, ::2] *= 2
    equal(x, c)
    out = torch.empty(0, device="cuda")
    assert torch.mm(x, x.t(), out=out) is out
    close(out, c @ c.t())
    x.copy_(c.t().contiguous().t())
    equal(x, c)
    equal(torch.zeros(4, 6).copy_(x.t().t()), c)
    complex_numbers = torch.view_as_complex(x.view(4, 3, 2))
    equal(complex_numbers.conj().resolve_conj(), torch.view_as_complex(c.view(4, 3, 2)).conj().resolve_conj())


@case
def random_numbers():
    a, b = (torch.rand(5, device="cuda", generator=torch.Generator("cuda").manual_seed(4)) for _ in range(2))
    equal(a, b)
    assert torch.randperm(5, device="cuda").sort().values.tolist() == [0, 1, 2, 3, 4]


def small_network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=2, dilation=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 4),
    )


@case
def training_step():
    parameters = []
    image = rand(2, 3, 9, 9)
    for device in ("cpu", "cuda"):
        model = small_network().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(image.to(device)), torch.tensor([1, 3], device=device))
            loss.backward()
            optimizer.step()
        parameters.append([p.detach() for p in model.parameters()])
    for on_cpu, on_cuda in zip(*parameters, strict=True):
        close(on_cuda, on_cpu, rtol=1e-4, atol=1e-5)


@case
def versions_of_what_was_written():
    for foreach in (False, True):
        p = torch.nn.Parameter(rand(3).cuda())
        p.grad = torch.ones_like(p)
        before = p._version
        torch.optim.Adam([p], foreach=foreach).step()
        assert p._version == before + 1, foreach
    x = rand(3).cuda()
    before = x._version
    x.add_(1)
    torch.add(x, x, out=x)
    assert x._version == before + 2


@case
def channels_last_and_autocast():
    model = small_network().cuda()
    image = rand(2, 3, 9, 9).cuda().to(memory_format=torch.channels_last)
    assert model[0](image).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda"):
        assert model(image).dtype == torch.float16
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert model(image).dtype == torch.bfloat16


@case
def backward_of_an_extension():
    class Stencil(torch.autograd.Function):  # its backward runs on another thread
        @staticmethod
        def forward(ctx, x):
            return ext.stencil(x)

        @staticmethod
        def backward(ctx, g):
            assert threading.current_thread() is not threading.main_thread()
            return ext.stencil(g.contiguous())

    x = rand(4, 6).cuda().requires_grad_()
    Stencil.apply(x * 2).sum().backward()
    close(x.grad, ext.stencil(torch.ones(4, 6).cuda()).cpu() * 2)


@torch.library.custom_op("fakegpu_test::stencil", mutates_args=(), device_types="cuda")
def stencil_op(x: torch.Tensor) -> torch.Tensor:
    return ext.stencil(x.contiguous())


@stencil_op.register_fake
def _(x):
    return x.new_empty(x.shape)


def _stencil_backward(ctx, grad):
    return stencil_op(grad)


stencil_op.register_autograd(_stencil_backward)


@torch.library.custom_op("fakegpu_test::wrong_fake", mutates_args=(), device_types="cuda")
def wrong_fake(x: torch.Tensor) -> torch.Tensor:
    return ext.stencil(x.contiguous())


@wrong_fake.register_fake
def _(x):
    return x.new_empty(x.shape[::-1])


@torch.library.custom_op("fakegpu_test::hidden_write", mutates_args=(), device_types="cuda")
def hidden_write(x: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x.clone()


@hidden_write.register_fake
def _(x):
    return torch.empty_like(x)


class _AutogradInTheKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return ext.stencil(x.contiguous())

    @staticmethod
    def backward(ctx, g):
        return ext.stencil(g.contiguous())


library = torch.library.Library("fakegpu_test", "FRAGMENT")
library.define("wrong_autograd(Tensor x) -> Tensor")
library.impl("wrong_autograd", _AutogradInTheKernel.apply, "CUDA")
library.impl("wrong_autograd", torch.empty_like, "Meta")
library.define("no_fake(Tensor x) -> Tensor")
library.impl("no_fake", lambda x: ext.stencil(x.contiguous()), "CUDA")


@case
def opcheck_accepts_a_good_operator():
    for requires_grad in (False, True):
        x = rand(5, 7).cuda().requires_grad_(requires_grad)
        results = torch.library.opcheck(torch.ops.fakegpu_test.stencil.default, (x,))
        assert len(results) == 4, results
        assert set(results.values()) == {"SUCCESS"}, results


@case
def opcheck_catches_bad_operators():
    x = rand(3, 5).cuda()
    for operator, argument, test in (
        ("wrong_fake", x, "test_faketensor"),
        ("no_fake", x, "test_aot_dispatch_dynamic"),
        ("hidden_write", x, "test_schema"),
        ("wrong_autograd", x.clone().requires_grad_(), "test_autograd_registration"),
    ):
        op = getattr(torch.ops.fakegpu_test, operator).default
        results = torch.library.opcheck(op, (argument,), raise_exception=False)
        assert results[test] != "SUCCESS", (operator, results)


@case
def gradcheck():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return ctx.factor * g * x, None

    x = rand(3, 2).double().cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Square.apply(x, 2), (x,))
    assert not torch.autograd.gradcheck(lambda x: Square.apply(x, 3), (x,), raise_exception=False)


@case
def compile_and_export():
    def f(x):
        return torch.ops.fakegpu_test.stencil(x.sin()).relu()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((4, 6), (5, 3), (9, 9)):
        x = rand(*shape).cuda()
        close(compiled(x), f(x))
        a, b = (x.clone().requires_grad_() for _ in range(2))
        compiled(a).sum().backward()
        f(b).sum().backward()
        close(a.grad, b.grad)

    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x)

    x = rand(4, 6).cuda()
    dynamic = {0: torch.export.Dim("h", min=2, max=64)}
    program = torch.export.export(Module(), (x,), dynamic_shapes=(dynamic,))
    y = rand(11, 6).cuda()
    close(program.module()(y), f(y))


@case
def two_devices():
    c = rand(4, 6)
    x = c.to("cuda:1")
    assert (x + x).device == x.device
    assert torch.zeros(3, device="cuda:1").device == x.device
    equal(x.to("cuda:0") * 2, c * 2)
    with torch.cuda.device(1):
        assert torch.ones(2, device="cuda").device == x.device
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            y = ext.stencil(x)
        stream.synchronize()
    assert stream.device == x.device
    close(y, ext.stencil(c.cuda()))


@case
def keep_going():
    """With FAKEGPU_KEEP_GOING=1: a test runner charges violations to a test and goes on."""
    fakegpu = ctypes.CDLL(None)
    for _ in range(2):
        x, y = rand(64).cuda(), rand(64).cuda()
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            ext.mistake(1, x, 64, y, True)
        assert fakegpu.fakegpu_violation_count() == 64
        fakegpu.fakegpu_reset_violations()
        assert fakegpu.fakegpu_violation_count() == 0
    close(ext.stencil(torch.ones(8, 8).cuda())[1:7, 1:7], torch.zeros(6, 6))


@case
def order_of_one_process():
    fakegpu = ctypes.CDLL(None)
    fakegpu.fakegpu_counters.restype = ctypes.c_char_p
    assert fakegpu.fakegpu_set_order(b"sideways") == 0
    for order in (b"forward", b"reverse", b"random"):
        assert fakegpu.fakegpu_set_order(order)
        ext.reduce(rand(5000).cuda())
    entries = [json.loads(line) for line in fakegpu.fakegpu_counters().decode().splitlines()]
    assert {e["order"] for e in entries if "reduce" in e["kernel"]} == {"forward", "reverse", "random"}
    fakegpu.fakegpu_set_order(b"forward")


if __name__ == "__main__":
    run_cases(sys.argv[1:])
