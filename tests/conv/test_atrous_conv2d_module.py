"""pyseg.nn.AtrousConv2d: a drop-in for nn.Conv2d, its packed weight, folded batch norm and plan."""

import copy
import gc
import io
import itertools
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from conv2d_cases import make
from torch import nn

from pyseg.nn import AtrousConv2d, AtrousConv2dPlan


def twins(*arguments, device="cpu", **keywords) -> tuple[AtrousConv2d, nn.Conv2d]:
    """Both modules with the same parameters."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(*arguments, **keywords)
    ours = AtrousConv2d(*arguments, **keywords)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device).eval(), theirs.to(device).eval()


def expected_of(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What torch makes of the module's present parameters, on the CPU in float64."""
    padding = module.padding
    bias = None if module.bias is None else module.bias.detach().cpu().double()
    weight = module.weight.detach().cpu().double()
    return nn.functional.conv2d(x.cpu().double(), weight, bias, module.stride, padding, module.dilation, module.groups)


def assert_current(module, x, tolerance=1e-4):
    """The module's output belongs to the parameters that it has now."""
    torch.testing.assert_close(
        module(x).detach().cpu().double(), expected_of(module, x), rtol=tolerance, atol=tolerance
    )


# ---- drop-in ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": "same", "dilation": (1, 3), "bias": False},
        {"kernel_size": 3, "padding": 1, "groups": 8},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": "same", "dilation": 3},
        {"kernel_size": 1, "padding": 1, "padding_mode": "reflect", "stride": (1, 2)},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
        {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "replicate"},
    ],
    ids=lambda arguments: "-".join(f"{k}={v}" for k, v in arguments.items()),
)
def test_like_conv2d(device, arguments):
    ours, theirs = twins(8, 8, device=device, **arguments)
    x = make((2, 8, 9, 10), device=device)
    expected = theirs.cpu()(x.cpu())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(ours(x).cpu(), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours(x[0]).cpu(), expected[0], rtol=1e-4, atol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [name for name, _ in ours.named_buffers()] == []
    assert repr(ours) == repr(theirs).replace("Conv2d", "AtrousConv2d")


def test_state_dict_both_ways():
    ours, theirs = twins(4, 4, 3)
    with torch.no_grad():
        ours(make((1, 4, 5, 5)))
        ours.weight.mul_(2)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def test_trains(device):
    """A few steps of gradient descent end where torch's end."""
    ours, theirs = twins(3, 4, 3, padding=2, dilation=2, device=device)
    theirs = theirs.cpu()
    x = make((2, 3, 6, 6), device=device)
    for module, data in ((ours, x), (theirs, x.cpu())):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(3):
            module.train()
            optimizer.zero_grad()
            module(data).square().mean().backward()
            optimizer.step()
            module.eval()
            with torch.no_grad():  # packs in between
                module(data)
    torch.testing.assert_close(ours.weight.cpu(), theirs.weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_current(ours, x)


def test_from_conv(device):
    conv = nn.Conv2d(4, 6, 3, padding=2, dilation=2).to(device)
    seen = []
    handle = conv.register_forward_hook(lambda *_: seen.append(1))
    ours = AtrousConv2d.from_conv(conv, exact=True)
    assert type(ours) is AtrousConv2d
    assert ours.exact
    assert ours.weight is conv.weight
    assert ours.bias is conv.bias
    x = make((1, 4, 7, 7), device=device)
    with torch.no_grad():
        assert_current(ours, x)
        conv.load_state_dict({"weight": torch.ones(6, 4, 3, 3), "bias": torch.zeros(6)}, assign=True)
        assert ours.weight is conv.weight
        ours.weight.data = ours.weight.data.to(device)
        ours.bias.data = ours.bias.data.to(device)
        assert_current(ours, x)
    assert len(seen) == 2
    handle.remove()
    ours(x)
    assert len(seen) == 2


def test_from_conv_refuses_what_it_would_break():
    class Standardised(nn.Conv2d):
        def forward(self, input):
            return super().forward(input - input.mean())

    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    for module in (Standardised(2, 2, 3), nn.LazyConv2d(2, 3), nn.Linear(2, 2), nn.Conv1d(2, 2, 3), parametrized):
        with pytest.raises(
            TypeError, match="AtrousConv2d: conv must be an nn.Conv2d without a forward of its own, got"
        ):
            AtrousConv2d.from_conv(module)


def test_parametrized(device):
    """A computed weight is a new tensor in each call, which may lie where the last one lay."""
    module = nn.utils.parametrizations.weight_norm(AtrousConv2d(4, 4, 3).to(device)).eval()
    x = make((1, 4, 6, 6), device=device)
    with torch.no_grad():
        for _ in range(4):
            module.parametrizations.weight.original0.mul_(1.5)
            assert_current(module, x)


# ---- packed weight ----


def packs(module) -> bool:
    return module._packed._entry is not None


@pytest.fixture
def packed_module(device):
    """A module whose weight has been packed, too large for its elements to be compared one by one."""
    module = twins(40, 33, 3, padding=1, device=device)[0]
    x = make((1, 40, 5, 6), device=device)
    with torch.no_grad():
        assert_current(module, x)
        assert packs(module)
    return module, x


def replace_parameter(module):
    module.weight = nn.Parameter(torch.ones_like(module.weight))


def optimizer_step(module):
    with torch.enable_grad():
        module(torch.ones(1, 40, 5, 6, device=module.weight.device)).sum().backward()
    torch.optim.Adam(module.parameters(), lr=0.1).step()


def fused_optimizer_step(module):
    # Fused optimisers write without counting a version. The gradient does not come from this module's last call.
    with torch.enable_grad():
        loss = module(torch.ones(1, 40, 5, 6, device=module.weight.device)).sum()
    with torch.no_grad():
        module(torch.ones(1, 40, 5, 6, device=module.weight.device))
    loss.backward()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(module.weight):
        module.weight.add_(module.weight.grad)


def swap_data_twice(module):
    # The second allocation may lie where the first one did, and no version was counted.
    for _ in range(2):
        module.weight.data = module.weight.data * 0.5 + 1


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict({"weight": torch.ones(33, 40, 3, 3), "bias": torch.zeros(33)}),
    "load_state_dict_assign": lambda m: m.load_state_dict(
        {k: torch.ones_like(v) for k, v in m.state_dict().items()}, assign=True
    ),
    "in_place": lambda m: m.weight.mul_(3),
    "one_element": lambda m: m.weight[7, 11, 1, 2].add_(100),
    "in_place_of_state_dict": lambda m: m.state_dict()["weight"].zero_(),
    "detached": lambda m: m.weight.detach().neg_(),
    "swap_data": lambda m: setattr(m.weight, "data", m.weight.data + 1),
    "swap_data_twice": swap_data_twice,
    "parameter": replace_parameter,
    "optimizer": optimizer_step,
    "fused_optimizer": fused_optimizer_step,
    "half_and_back": lambda m: m.half().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}
CPU_CHANGES = {
    # Nothing but the values tells of these.
    "through_data": lambda m: m.weight.data.mul_(3),
    "one_tap_through_data": lambda m: m.weight.data[:, :, 1, 1].add_(1),
    "numpy": lambda m: np.copyto(m.weight.detach().numpy(), 2.0),
    "double": lambda m: m.double().float(),
    "share_memory": lambda m: m.share_memory().weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_notices_changed_weights(packed_module, change, mode):
    module, x = packed_module
    with torch.no_grad():
        CHANGES[change](module)
    with mode():
        assert_current(module, x)
        assert_current(module, x)


@pytest.mark.parametrize("change", CPU_CHANGES)
def test_notices_changed_values(change):
    module = twins(40, 33, 3, padding=1)[0]
    x = make((1, 40, 5, 6))
    with torch.no_grad():
        assert_current(module, x)
        CPU_CHANGES[change](module)
        assert_current(module, x)


@pytest.mark.parametrize("index", [0, 1, 100, 2303])
def test_notices_any_element_of_a_small_weight(index):
    module = twins(16, 16, 3)[0]
    x = make((1, 16, 4, 4))
    with torch.no_grad():
        assert_current(module, x)
        module.weight.data.view(-1)[index] = 50.0
        assert_current(module, x)


def test_packs_once(packed_module):
    module, x = packed_module
    entry = module._packed._entry
    with torch.no_grad():
        module(x)
    with torch.inference_mode():
        module(x)
    assert module._packed._entry is entry


def test_needs_no_packing(device):
    """Training, depthwise, and what is torch's."""
    x = make((1, 4, 6, 6), device=device)
    training = twins(4, 4, 3, device=device)[0]
    training(x)
    depthwise, strided = twins(4, 4, 3, groups=4, device=device)[0], twins(4, 4, 3, stride=2, device=device)[0]
    with torch.no_grad():
        depthwise(x)
        strided(x)
    assert not any(packs(module) for module in (training, depthwise, strided))


def test_frozen_weight_with_gradient_for_the_input(packed_module):
    """The packed weight serves, and gradients flow past it."""
    module, x = packed_module
    module.requires_grad_(False)
    x = x.clone().requires_grad_()
    module(x).sum().backward()
    assert packs(module)
    wide = x.detach().cpu().double().requires_grad_()
    expected_of(module, wide).sum().backward()
    torch.testing.assert_close(x.grad.cpu().double(), wide.grad, rtol=1e-4, atol=1e-4)


def test_packed_in_inference_mode_then_training(device):
    """What inference mode has cached may meet autograd later."""
    module = twins(4, 4, 3, device=device)[0]
    module.fold_batch_norm(nn.BatchNorm2d(4).to(device).eval())
    module.requires_grad_(False)
    x = make((1, 4, 6, 6), device=device)
    with torch.inference_mode():
        module(x)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("channels", [4, 40])
@pytest.mark.parametrize("change", ["all", "one"])
def test_inference_tensors(device, channels, change):
    """They count no versions: values are compared on the CPU, elsewhere nothing is kept."""
    with torch.inference_mode():
        module = twins(channels, channels, 3, device=device)[0]
        x = make((1, channels, 6, 6), device=device)
        assert module.weight.is_inference()
        assert_current(module, x)
        assert packs(module) == (device == "cpu")
        target = module.weight if change == "all" else module.weight[1, 2, 0, 1]
        target.add_(3)
        assert_current(module, x)
    with torch.no_grad():
        assert_current(module, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_packs_for_its_dtype(packed_module, device, dtype):
    module, x = packed_module
    with torch.no_grad(), torch.autocast(device, dtype):
        y = module(x)
        assert module._packed._entry[2].dtype == dtype
        assert torch.equal(y, module(x))
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu().double(), expected_of(module, x), rtol=0.02, atol=0.02)
    with torch.no_grad():
        assert_current(module, x)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "save"])
def test_copies_are_independent(packed_module, method):
    module, x = packed_module
    with torch.no_grad():
        before = module(x)
        twin = {**COPIES, "save": saved_and_loaded}[method](module)
        assert not packs(twin)
        assert packs(module)
        assert torch.equal(twin(x), before)
        twin.weight.mul_(2)
        assert_current(twin, x)
        assert torch.equal(module(x), before)


def test_pickle_holds_no_packed_weight():
    module = twins(40, 33, 3)[0]
    before = len(pickle.dumps(module))
    with torch.no_grad():
        module(make((1, 40, 5, 5)))
    assert packs(module)
    assert len(pickle.dumps(module)) == before


@pytest.mark.parametrize("drop", ["to", "train", "clear", "delete"])
def test_memory_is_given_back(drop):
    module = twins(40, 33, 3)[0]
    with torch.no_grad():
        module(make((1, 40, 5, 5)))
    packed = weakref.ref(module._packed._entry[2])
    if drop == "to":
        module.double()
    elif drop == "train":
        module.train()
    elif drop == "clear":
        module.clear_cache()
    else:
        del module
        gc.collect()
    assert packed() is None


def test_threads_share_a_module():
    """Data-parallel replicas share the cache object and bring weights of their own."""
    from concurrent.futures import ThreadPoolExecutor

    module = twins(8, 8, 3, padding=1)[0]
    replicas = []
    for factor in range(4):
        replica = module._replicate_for_data_parallel()
        replica.weight = module.weight.detach() * factor
        replica.bias = module.bias.detach()
        replicas.append(replica)
    x = make((1, 8, 6, 6))

    def run(index):
        with torch.no_grad():
            assert_current(replicas[index % 4], x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(80)))


def test_functional_call(packed_module):
    module, x = packed_module
    weight = torch.randn_like(module.weight)
    with torch.no_grad():
        y = torch.func.functional_call(module, {"weight": weight}, (x,))
        bias = module.bias.cpu().double()
        expected = nn.functional.conv2d(x.cpu().double(), weight.cpu().double(), bias, padding=1)
        torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-4, atol=1e-4)
        assert_current(module, x)


def test_ensemble_by_vmap():
    modules = [twins(3, 4, 3)[0], AtrousConv2d(3, 4, 3).eval()]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = make((1, 3, 6, 6))
    with torch.no_grad():
        y = torch.func.vmap(lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
        for module, result in zip(modules, y, strict=True):
            torch.testing.assert_close(result, module(x))


def test_traced_graphs_follow_their_weights():
    """torch.jit.trace and make_fx record operators, not the packed weight of the moment."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module = twins(8, 8, 3)[0].requires_grad_(False)
    x = make((1, 8, 6, 6))
    module(x)
    assert packs(module)
    traced = torch.jit.trace(module, x)
    symbolic = torch.fx.symbolic_trace(module)
    graph = make_fx(lambda w, b, x: torch.func.functional_call(module, {"weight": w, "bias": b}, (x,)))(
        module.weight, module.bias, x
    )
    with torch.no_grad():
        module.weight.mul_(2)
    expected = expected_of(module, x).float()
    for result in (traced(x), symbolic(x), graph(module.weight, module.bias, x)):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.needs_gpu("graph capture")
def test_cuda_graph_follows_its_weights(device):
    if device != "cuda":
        return
    module = twins(40, 33, 3, padding=1, device=device)[0]
    x = make((1, 40, 8, 8), device=device)
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        module.weight.mul_(2)
        graph.replay()
        torch.testing.assert_close(y.cpu().double(), expected_of(module, x), rtol=1e-4, atol=1e-4)


# ---- folded batch norm ----


def batch_norm(channels, device="cpu", **keywords):
    torch.manual_seed(3)
    bn = nn.BatchNorm2d(channels, **keywords).to(device).eval()
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        if bn.affine:
            bn.weight.normal_()
            bn.bias.normal_()
    return bn


def folded(device="cpu", relu=True, **keywords):
    conv = twins(6, 5, 3, padding=2, dilation=2, device=device)[0]
    bn = batch_norm(5, device, **keywords)
    conv.fold_batch_norm(bn, relu)
    return conv, bn


def unfused(conv, bn, x, relu=True):
    plain = nn.Conv2d(6, 5, 3, padding=2, dilation=2)
    plain.load_state_dict(conv.state_dict())
    y = copy.deepcopy(bn).cpu().float()(plain(x.cpu().float()))
    return y.relu() if relu else y


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_folded_batch_norm(device, affine, relu, mode):
    conv, bn = folded(device, relu, affine=affine)
    x = make((2, 6, 7, 7), device=device)
    with mode():
        for _ in range(2):
            torch.testing.assert_close(conv(x).cpu(), unfused(conv, bn, x, relu), rtol=1e-4, atol=1e-4)
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert list(conv.children()) == []


def test_folded_relu_alone(device):
    conv = twins(6, 5, 3, device=device)[0]
    conv.fold_batch_norm(None, relu=True)
    x = make((1, 6, 5, 5), device=device)
    torch.testing.assert_close(conv(x).cpu().double(), expected_of(conv, x).relu(), rtol=1e-4, atol=1e-4)


def test_folding_depends_on_the_mode():
    conv, bn = folded()
    x = make((1, 6, 7, 7))
    plain = nn.Conv2d.forward(conv, x)
    assert conv.applies_folded
    conv.train()
    assert not conv.applies_folded
    torch.testing.assert_close(conv(x).double(), expected_of(conv, x), rtol=1e-4, atol=1e-4)
    conv.eval()
    bn.train()
    assert not conv.applies_folded
    torch.testing.assert_close(conv(x).double(), expected_of(conv, x), rtol=1e-4, atol=1e-4)
    bn.eval()
    assert torch.equal(conv(x), plain)
    conv.unfold_batch_norm()
    torch.testing.assert_close(conv(x).double(), expected_of(conv, x), rtol=1e-4, atol=1e-4)


BN_CHANGES = {
    "statistics": lambda bn: bn.running_mean.add_(1),
    "variance_through_data": lambda bn: bn.running_var.data.mul_(2),
    "weight": lambda bn: bn.weight.mul_(2),
    "one_bias": lambda bn: bn.bias[3].add_(5),
    "bias_swapped": lambda bn: setattr(bn, "bias", nn.Parameter(bn.bias + 1)),
    "eps": lambda bn: setattr(bn, "eps", 0.7),
    "load_state_dict": lambda bn: bn.load_state_dict(nn.BatchNorm2d(5).state_dict()),
}


@pytest.mark.parametrize("change", BN_CHANGES)
def test_notices_changed_batch_norm(device, change):
    if device == "cuda" and "through_data" in change:
        return  # documented: on CUDA only `clear_cache` helps
    conv, bn = folded(device)
    x = make((1, 6, 7, 7), device=device)
    with torch.no_grad():
        conv(x)
        entry = conv._affine._entry
        conv(x)
        assert conv._affine._entry is entry  # kept
        BN_CHANGES[change](bn)
        torch.testing.assert_close(conv(x).cpu(), unfused(conv, bn, x), rtol=1e-4, atol=1e-4)


def test_gradients_through_folded_batch_norm():
    """Fine-tuning with frozen statistics: weight, bias, gamma and beta learn as they do unfused."""
    conv, bn = folded()
    x = make((2, 6, 7, 7))
    tensors = [conv.weight, conv.bias, bn.weight, bn.bias]
    got = torch.autograd.grad(conv(x).square().sum(), tensors)
    y = bn(nn.functional.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2)).relu()
    want = torch.autograd.grad(y.square().sum(), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [*COPIES, "save"])
def test_copies_keep_the_fold(method):
    """In a copied model the copied convolution folds the copied batch norm."""
    conv, bn = folded()
    model = nn.ModuleList([conv, bn])
    x = make((1, 6, 7, 7))
    twin, twin_bn = {**COPIES, "save": saved_and_loaded}[method](model)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), conv(x))
        if method != "copy":
            twin_bn.running_mean.add_(1)
            assert twin_bn is twin._folded[0]
        torch.testing.assert_close(twin(x), unfused(twin, twin_bn, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_folded_with_other_dtypes(device, dtype):
    """A half convolution with a float32 batch norm folds, too; the affine map is computed in float32."""
    conv, bn = folded(device)
    x = make((1, 6, 7, 7), device=device)
    expected = unfused(conv, bn, x)
    conv.to(dtype)
    y = conv(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 3e-2 if dtype.itemsize == 2 else 1e-4
    torch.testing.assert_close(y.float().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_fold_errors():
    conv = twins(6, 5, 3)[0]
    with pytest.raises(ValueError, match="AtrousConv2d: bn must have running statistics"):
        conv.fold_batch_norm(nn.BatchNorm2d(5, track_running_stats=False))
    with pytest.raises(ValueError, match="AtrousConv2d: bn must have 5 features, got 6"):
        conv.fold_batch_norm(nn.BatchNorm2d(6))


def test_repr_tells():
    conv, _ = folded()
    conv.exact = True
    assert "exact=True" in repr(conv)
    assert "folded=batch_norm+relu" in repr(conv)


# ---- plan ----


def test_plan_of_what_is_torchs():
    for module, reason in (
        (AtrousConv2d(4, 4, 5), "kernel 5x5 is neither 3x3 nor 1x1"),
        (AtrousConv2d(4, 4, 1, groups=4), "groups 4 of a 1x1 kernel is not 1"),
        (AtrousConv2d(4, 4, 1, stride=2, padding=1), r"stride \(2, 2\) with padding \(1, 1\)"),
        (AtrousConv2d(4, 4, 1, dtype=torch.bfloat16), "1x1 in 16 bits"),
        (AtrousConv2d(4, 4, 3, stride=2), r"stride \(2, 2\) is not 1"),
        (AtrousConv2d(4, 8, 3, groups=4), "groups 4 is neither 1 nor C_in = C_out"),
        (AtrousConv2d(4, 4, 3, device="meta"), "no kernels for meta"),
    ):
        plan = module.plan((1, 4, 9, 9))
        assert isinstance(plan, AtrousConv2dPlan)
        assert plan.path == "torch"
        assert re.search(reason, plan.reason)
        assert str(plan) == f"torch: {plan.reason}"


def test_plan_on_cpu():
    paths = {}
    for channels, size, rate in itertools.product((16, 256), (33, 65), (1, 6, 24)):
        module = AtrousConv2d(channels, channels, 3, padding=rate, dilation=rate, device="cpu")
        plan = module.plan((1, channels, size, size))
        assert plan.path in ("torch", "direct", "winograd")
        assert plan.reason
        assert module.plan((channels, size, size)) == plan
        paths[channels, size, rate] = plan.path
        module.exact = True
        exact = module.plan((1, channels, size, size))
        assert exact.path != "winograd"
        assert "exact" in exact.reason or plan.path != "winograd"
    assert "winograd" in paths.values()
    assert AtrousConv2d(8, 8, 3, groups=8).plan((1, 8, 9, 9)).path == "depthwise"


def test_plan_of_pointwise_on_cpu():
    plan = AtrousConv2d(64, 32, 1).plan((2, 64, 9, 10))
    assert (plan.path, plan.reason, plan.details["taps"]) == ("direct", "1x1: one matrix product", 90)
    assert AtrousConv2d(64, 32, 1, stride=(2, 3)).plan((2, 64, 9, 10)).details["taps"] == 20
    assert AtrousConv2d(64, 32, 1, padding=1).plan((2, 64, 9, 10)).details["taps"] == 90  # padding has none


def test_plan_counts_the_padding_of_other_modes():
    zeros, reflect = AtrousConv2d(64, 64, 3, padding=2, dilation=2), AtrousConv2d(
        64, 64, 3, padding=2, dilation=2, padding_mode="reflect"
    )  # fmt: skip
    padded = AtrousConv2d(64, 64, 3, dilation=2)
    assert reflect.plan((1, 64, 20, 20)) == padded.plan((1, 64, 24, 24))
    assert zeros.plan((1, 64, 20, 20)).path in ("direct", "winograd")


@pytest.mark.parametrize(
    ("dtype", "tf32", "groups", "path"),
    [
        (torch.float16, False, 1, "implicit_gemm"),
        (torch.bfloat16, False, 1, "implicit_gemm"),
        (torch.float32, True, 1, "implicit_gemm"),
        (torch.float32, False, 1, "plain"),
        (torch.float64, True, 1, "plain"),
        (torch.float16, False, 8, "depthwise"),
    ],
)
def test_plan_on_cuda(device, dtype, tf32, groups, path):
    if device != "cuda":
        return
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    assert AtrousConv2d(8, 8, 3, groups=groups, device=device, dtype=dtype).plan((1, 8, 9, 9)).path == path


def test_plan_errors():
    with pytest.raises(RuntimeError, match=r"AtrousConv2d: input_shape must be \[N, 4, H, W\].*got \[1, 5, 9, 9\]"):
        AtrousConv2d(4, 4, 3).plan((1, 5, 9, 9))
