"""Finds the convolutions of a model and what can be folded into them, by structure alone."""

import copy
import inspect
from collections import defaultdict
from dataclasses import dataclass, field

from torch import fx, nn

from pyseg._accelerate.modules import Chain, is_accelerated
from pyseg.nn import AtrousConv2d
from pyseg.nn._folded import has_hooks


@dataclass
class Found:
    """A convolution of the model: `chain` if it can be accelerated at all, and why no more (or nothing) can be done."""

    name: str
    module: nn.Module
    chain: Chain | None
    reason: str


@dataclass
class _Site:
    """One place in a forward that calls a convolution, with what follows it (None: something else)."""

    norm: nn.Module | None
    relu: nn.Module | None
    reason: str


@dataclass
class _Sites:
    """Every place that calls a module, over the forwards of all parents.

    A module that is used in several ways is folded only where all its uses agree, so parents that reach past their
    children into grandchildren do no harm.
    """

    convs: dict[nn.Module, list[_Site]] = field(default_factory=lambda: defaultdict(list))
    # The convolution that feeds the batch norm or ReLU there and nothing else; None: something else does.
    followers: dict[nn.Module, list[nn.Module | None]] = field(default_factory=lambda: defaultdict(list))
    untraced: dict[nn.Module, str] = field(default_factory=dict)


def find_convolutions(model: nn.Module) -> list[Found]:
    """All convolutions of the model, in the order of named_modules; a module that is there twice comes once."""
    convs = [(name, module) for name, module in model.named_modules() if _is_convolution(module)]
    sites = _collect_sites(model)
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    found = []
    for name, module in convs:
        reason = _why_not(module)
        if reason:
            found.append(Found(name, module, None, reason))
            continue
        assert isinstance(module, nn.Conv2d)
        chain, reason = _chain(module, sites, parents.get(module))
        found.append(Found(name, module, chain, reason))
    return found


def _is_convolution(module: nn.Module) -> bool:
    kind = type(module)
    quantized = "quantized" in kind.__module__ and "Conv2d" in kind.__name__ and "Packed" not in kind.__name__
    return isinstance(module, nn.Conv2d) or quantized


def _why_not(module: nn.Module) -> str:
    """Why a convolution is left as it is, whatever surrounds it."""
    if is_accelerated(module):
        return "accelerated before"
    if not isinstance(module, nn.Conv2d):
        return "quantized"
    if nn.utils.parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed by a parametrization"
    if type(module) is not nn.Conv2d and type(module) is not AtrousConv2d:
        return f"{type(module).__name__} is a Conv2d of its own kind"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    return ""


def _chain(conv: nn.Conv2d, sites: _Sites, parent: nn.Module | None) -> tuple[Chain, str]:
    """The most that can be folded into `conv`, and what stands in the way of more."""
    alone = Chain(conv, None, None, False)
    uses = sites.convs[conv]
    if not uses:
        return alone, sites.untraced.get(parent, "") if parent is not None else ""
    norm, relu, reason = uses[0].norm, uses[0].relu, uses[0].reason
    if any(use.norm is not norm for use in uses):
        return alone, "called in several places, with different followers"
    if isinstance(conv, AtrousConv2d) and conv._folded is not None:
        return alone, "has a batch norm folded in already"
    if norm is not None:
        assert isinstance(norm, nn.BatchNorm2d)
        reason = _why_not_fold(conv, norm)
        if not reason and any(feeder is not conv for feeder in sites.followers[norm]):
            reason = "its batch norm serves other places, too"
        if reason:
            return alone, reason
    if any(use.relu is not relu for use in uses) or (relu is not None and has_hooks(relu)):
        relu = None
    shared = relu is not None and any(feeder is not conv for feeder in sites.followers[relu])
    assert relu is None or isinstance(relu, nn.ReLU)
    return Chain(conv, norm, relu, shared), reason


def _why_not_fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
    if norm.running_mean is None or norm.running_var is None:
        return "its batch norm has no running statistics"
    if norm.num_features != conv.out_channels or norm.running_mean.dtype != conv.weight.dtype:
        return "its batch norm does not fit it"
    if has_hooks(conv) or has_hooks(norm):
        return "hooks look at what runs between it and its batch norm"
    return ""


# ---- call sites ----


def _collect_sites(model: nn.Module) -> _Sites:
    sites = _Sites()
    for parent in model.modules():
        # A forward can matter only where convolutions are below it; containers have none.
        if type(parent).forward is nn.Module.forward or isinstance(parent, nn.Conv2d):
            continue
        if not any(isinstance(module, nn.Conv2d) for module in parent.modules()):
            continue
        try:
            graph = parent.graph if isinstance(parent, fx.GraphModule) else _trace(parent)
        except Exception as error:  # user code, run in a way that it was not written for: anything can come out
            text = str(error).strip().splitlines()
            kind = type(parent).__name__
            sites.untraced[parent] = f"cannot follow {kind}.forward: {text[0] if text else type(error).__name__}"
            continue
        _read(graph, parent, sites)
    return sites


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(parent: nn.Module) -> fx.Graph:
    """The graph of parent's own forward in eval mode, its children being opaque."""
    # On a stand-in, so that attributes that forward sets do not leave fx proxies in the user's module.
    stand_in = copy.copy(parent)
    for name, value in parent.__dict__.items():
        if isinstance(value, dict | list | set):
            stand_in.__dict__[name] = copy.copy(value)
    stand_in.training = False
    # Optional inputs (masks, targets) are left out; other defaults stay open: a forward that branches on them
    # may run otherwise at the next call, so it must not be followed.
    optional = {
        name: None
        for name, parameter in inspect.signature(type(parent).forward).parameters.items()
        if parameter.default is None
    }
    return _LeafTracer().trace(stand_in, concrete_args=optional or None)


def _read(graph: fx.Graph, root: nn.Module, sites: _Sites) -> None:
    called = {node: root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    feeders: dict[fx.Node, nn.Module] = {}
    for node, module in called.items():
        if not isinstance(module, nn.Conv2d):
            continue
        site = _Site(None, None, "")
        follower = _only_user(node, called)
        if follower is not None and type(called[follower]) is nn.BatchNorm2d:
            site.norm, feeders[follower] = called[follower], module
            follower = _only_user(follower, called)
        elif any(user in called and type(called[user]) is nn.BatchNorm2d for user in node.users):
            site.reason = f"its batch norm shares its output with {len(node.users) - 1} others"
        if follower is not None and type(called[follower]) is nn.ReLU:
            site.relu, feeders[follower] = called[follower], module
        sites.convs[module].append(site)
    for node, module in called.items():
        if isinstance(module, nn.BatchNorm2d | nn.ReLU):
            sites.followers[module].append(feeders.get(node))


def _only_user(node: fx.Node, called: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """The module call that alone uses `node`, and uses nothing else; identities are looked through."""
    while len(node.users) == 1:
        (user,) = node.users
        if user not in called or user.args != (node,) or user.kwargs:
            return None
        if type(called[user]) is not nn.Identity or has_hooks(called[user]):
            return user
        node = user
    return None
