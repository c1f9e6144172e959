"""The losses as modules, in compiled and exported graphs, and over several processes."""

import copy
import inspect
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import loss_oracles as oracle
import pytest
import torch

import pyseg.functional as P
import pyseg.nn as nn
from pyseg.functional import losses as functions

MODULES = [name for name in nn.losses.__all__ if name != "SegmentationLoss"]
BINARY = {"WeightedBCELoss", "BalancedCrossEntropyLoss", "LovaszHingeLoss"}
OF_A_CALL = {"input", "target", "pixel_weight", "image_labels", "point_weight", "objectness"}
OTHERS = {
    P.multiscale_cross_entropy,
    P.points_to_labels,
    P.pool_labels,
    P.sigmoid_focal_loss,
    P.unet_border_weights,
}
COMPILED = ["CrossEntropyLoss", "TopKCrossEntropyLoss", "MCCLoss", "LovaszSoftmaxLoss", "DiceCELoss"]


def case(name, **arguments):
    """Module, logits and target."""
    x, target = oracle.draw((2, 3, 8, 7), "binary" if name in BINARY else "multiclass", ignore=9)
    if name == "HausdorffERLoss":
        arguments["erosions"] = 2
    return getattr(nn, name)(ignore_index=9, **arguments), x, target


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_function_has_a_module():
    wrapped = {getattr(nn, name)._function for name in MODULES}
    assert {getattr(P, name) for name in functions.__all__} - wrapped == OTHERS


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_function(name):
    module, x, target = case(name)
    function = type(module)._function
    arguments = {"erosions": 2} if name == "HausdorffERLoss" else {}
    assert torch.equal(module(x, target), function(x, target, ignore_index=9, **arguments))
    of_function = [p for p in inspect.signature(function).parameters.values()]
    of_module = list(inspect.signature(getattr(nn, name)).parameters.values())
    assert [p for p in of_function if p.name not in OF_A_CALL] == of_module
    assert function.__name__ in type(module).__doc__
    for copied in (copy.deepcopy(module), pickled(module)):
        assert torch.equal(copied(x, target), module(x, target))


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_module_arguments():
    module = nn.DiceLoss([1.0, 2.0, 0.5], squared=True, smooth=(0.0, 1e-5))
    assert repr(module) == "DiceLoss(weight=[1.0, 2.0, 0.5], squared=True, smooth=(0.0, 1e-05))"
    assert module.to(torch.float64).weight.dtype == torch.float64
    assert list(module.state_dict()) == ["weight"]
    assert repr(nn.DiceLoss()) == "DiceLoss()"
    x, target = oracle.draw((2, 3, 8, 7), "multiclass")
    weights = torch.rand(target.shape)
    module = nn.CrossEntropyLoss(reduction="sum")
    expected = P.cross_entropy(x, target, pixel_weight=weights, reduction="sum")
    assert torch.equal(module(x, target, pixel_weight=weights), expected)
    with pytest.raises(TypeError, match="DiceLoss: got an unexpected keyword argument 'sqaured'"):
        nn.DiceLoss(sqaured=True)


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    module, x, target = case(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 5):
        z, t = x[..., :rows, :].contiguous(), target[..., :rows, :].contiguous()
        results = []
        for call in (module, compiled):
            variable = z.clone().requires_grad_()
            value = call(variable, t)
            results.append((value.detach(), torch.autograd.grad(value, variable)[0]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


def test_inductor():
    module, x, target = case("DiceCELoss")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    variables = [x.clone().requires_grad_() for _ in range(2)]
    values = [call(variable, target) for call, variable in zip((module, compiled), variables, strict=True)]
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value, z)[0] for value, z in zip(values, variables, strict=True)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["DiceLoss", "CrossEntropyLoss"])
def test_export(name):
    module, x, target = case(name)
    size = torch.export.Dim("size", min=2, max=100)
    program = torch.export.export(module, (x, target), dynamic_shapes=({2: size}, {1: size}), strict=False)
    for rows in (8, 5):
        z, t = x[..., :rows, :], target[..., :rows, :]
        torch.testing.assert_close(program.module()(z, t), module(z, t))


def test_autocast_and_inference_mode():
    module, x, target = case("DiceCELoss")
    with torch.autocast("cpu", torch.bfloat16):
        value = module(x.bfloat16(), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, module(x.bfloat16(), target))
    with torch.inference_mode():
        assert torch.equal(module(x, target), case("DiceCELoss")[0](x, target))


def test_threads_do_not_change_bits():
    x, target = oracle.draw((2, 3, 64, 65), "multiclass", ignore=9)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for name in ("DiceCELoss", "FocalLoss", "HausdorffDTLoss"):
                variable = x.clone().requires_grad_()
                value = getattr(nn, name)(ignore_index=9)(variable, target)
                results.append((count, value.detach(), torch.autograd.grad(value, variable)[0]))
    finally:
        torch.set_num_threads(threads)
    for (_, value, gradient), (_, value2, gradient2) in zip(results[:3], results[3:], strict=True):
        assert torch.equal(value, value2)
        assert torch.equal(gradient, gradient2)


def test_second_derivative_raises():
    for name in ("DiceLoss", "LovaszSoftmaxLoss", "HausdorffDTLoss"):
        module, x, target = case(name)
        variable = x.requires_grad_()
        (gradient,) = torch.autograd.grad(module(variable, target), variable, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.sum(), variable)


WORKER = """
    import sys
    import torch, torch.distributed as dist
    import pyseg.functional as P

    rank, file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(4, 3, 8, 7, generator=generator), torch.randint(0, 3, (4, 8, 7), generator=generator)
    group = dist.group.WORLD
    calls = {
        "dice": lambda z, t, **k: P.dice_loss(z, t, batch=True, ignore_index=1, label_smoothing=0.1, **k),
        "mcc": lambda z, t, **k: P.mcc_loss(z, t, batch=True, **k),
        "dice_ce": lambda z, t, **k: P.dice_ce_loss(z, t, batch=True, **k),
        "cross_entropy": lambda z, t, **k: P.cross_entropy(z, t, [1.0, 2.0, 0.5], **k),
        "smoothed": lambda z, t, **k: P.weighted_binary_cross_entropy(
            z, (t == 1).unsqueeze(1).expand_as(z).long(), mode="multilabel", label_smoothing=0.1, **k),
        "smoothed sum": lambda z, t, **k: P.weighted_binary_cross_entropy(
            z, (t == 1).unsqueeze(1).expand_as(z).long(), [1.0, 2.0, 0.5], mode="multilabel", label_smoothing=0.1,
            reduction="sum", **k),
        "smoothed cross_entropy": lambda z, t, **k: P.cross_entropy(
            z, t, [1.0, 2.0, 0.5], ignore_index=2, label_smoothing=0.1, **k),
        "smoothed dice_ce": lambda z, t, **k: P.dice_ce_loss(
            z, t, [1.0, 2.0, 0.5], squared=True, batch=True, ignore_index=0, label_smoothing=0.1, **k),
        "smoothed tversky": lambda z, t, **k: P.tversky_loss(
            z, t.clamp_max(1), batch=True, absent="skip", label_smoothing=0.1, **k),
        "smoothed mcc": lambda z, t, **k: P.mcc_loss(z, t, batch=True, ignore_index=1, label_smoothing=0.1, **k),
    }
    results = {}
    for name, call in calls.items():
        whole = x.clone().requires_grad_()
        expected = call(whole, target)
        (wanted,) = torch.autograd.grad(expected, whole)
        part = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares
        mine = x[part].clone().requires_grad_()
        value = call(mine, target[part], group=group)
        (gradient,) = torch.autograd.grad(value, mine)
        # The sum of both processes' losses is twice the loss: an average over the processes makes it the gradient.
        results[name] = (
            ((value - expected) / expected).abs().item(),
            (gradient / 2 - wanted[part]).abs().max().item(),
            wanted.abs().max().item(),
        )
    torch.save(results, f"{out}{rank}")
    dist.barrier()  # gloo aborts a process whose peer leaves while its threads still answer
    dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """Statistics over a group of processes: values and gradients of the whole batch in one process."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    command = [sys.executable, str(script)]
    arguments = [str(tmp_path / "rendezvous"), str(tmp_path / "out")]
    import pyseg

    environment = {**os.environ, "PYTHONPATH": str(Path(pyseg.__file__).parents[1])}
    workers = [
        subprocess.Popen([*command, str(rank), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    for rank in range(2):
        for name, (value, gradient, scale) in torch.load(tmp_path / f"out{rank}").items():
            assert value < 1e-6, name
            assert gradient < 1e-5 * scale, name


def test_values_per_class_are_buffers():
    module = nn.FocalLoss(alpha=[0.1, 0.5, 0.9], gamma=1.5)
    assert module.alpha.shape == (3,)
    assert repr(nn.FocalLoss(alpha=0.25)) == "FocalLoss(alpha=0.25)"
    x, target = oracle.draw((2, 3, 8, 7), "multiclass")
    torch.testing.assert_close(module(x, target), P.focal_loss(x, target, alpha=[0.1, 0.5, 0.9], gamma=1.5))
