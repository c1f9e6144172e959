"""dense_crf with links across the images of a batch, against dense matrices over all pixels of all images."""

import dataclasses

import pytest
import torch
from crf_cases import on_each_number_of_threads, rand, randn

from pyseg import reference
from pyseg.functional import (
    GaussianKernel,
    LinkKernel,
    PixelLinks,
    bilateral_features,
    correspondence_links,
    dense_crf,
    dense_crf_energy,
    dense_crf_kernels,
    pixel_links,
)

VIEWS, CLASSES, SHAPE = 3, 4, (4, 5)
PIXELS = SHAPE[0] * SHAPE[1]
NORMALIZATIONS = ["symmetric", "before", "after", "none"]


def views(dtype=torch.float64):
    """Unaries, images of few colours, and pairs of pixels of different views with weights."""
    unary = randn(VIEWS, CLASSES, *SHAPE, dtype=dtype) * 2
    image = torch.randint(0, 3, (VIEWS, 3, *SHAPE), generator=torch.Generator().manual_seed(0)) * 20
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([VIEWS, *SHAPE])
    first, second = ((torch.rand(25, 3, generator=generator) * sizes).long() for _ in range(2))
    return unary, image, (first, second, (VIEWS, *SHAPE), rand(25, seed=2, dtype=dtype))


def on(links, device):
    return PixelLinks(*[tensor.to(device) for tensor in links])


def block_diagonal(matrices):
    return torch.block_diag(*matrices)


def normalized(matrix, normalization):
    columns, rows = matrix.sum(0) + 1e-20, matrix.sum(1) + 1e-20
    before, after = {
        "symmetric": (columns.rsqrt(), rows.rsqrt()),
        "before": (columns.reciprocal(), torch.ones_like(rows)),
        "after": (torch.ones_like(columns), rows.reciprocal()),
        "none": (torch.ones_like(columns), torch.ones_like(rows)),
    }[normalization]
    return after[:, None] * matrix * before


def potts(weight):
    return -weight * torch.eye(CLASSES, dtype=torch.float64)


def brute_force(unary, image, pairs, costs, normalization="none", **arguments):
    """Smoothness, appearance and links of these costs [C, C] over all pixels of all views."""
    wide = image.double()
    matrices = [
        block_diagonal(reference.pairwise_matrix(bilateral_features(wide[:, :0], 3.0).flatten(2))),
        block_diagonal(reference.pairwise_matrix(bilateral_features(wide).flatten(2))),
        normalized(reference.link_matrix(*pairs), normalization),
    ]
    result = reference.multi_view_crf(unary.cpu().flatten(2), matrices, costs, **arguments)
    return result.reshape(unary.shape)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_exact(device, normalization):
    """The definition, whatever the compatibility: messages of all kernels of all views."""
    unary, image, pairs = views()
    matrix = randn(CLASSES, CLASSES, seed=4)
    for weight, cost in ((2.0, potts(2.0)), (rand(CLASSES, seed=3), None), (matrix, matrix)):
        cost = -torch.diag(weight) if cost is None else cost
        kernel = LinkKernel(on(correspondence_links(*pairs), device), weight, normalization)
        got = dense_crf(
            unary.to(device), image.to(device), smoothness=1.0, appearance=1.5, kernels=[kernel], iterations=3,
            accuracy="exact", temperature=1.5,
        )  # fmt: skip
        expected = brute_force(
            unary, image, pairs, [potts(1.0), potts(1.5), cost], normalization, iterations=3, temperature=1.5
        )
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_directed_links(device, normalization):
    """Pixel 2 has no links and two lead to it: the scale of what it sends is not that of what it gets, 1e10."""
    unary = randn(1, 2, 1, 4, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)
    links = pixel_links(torch.tensor([0, 2, 3, 3, 3]), torch.tensor([1, 2, 2]), weights)
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[[0, 0, 1], [1, 2, 2]] = weights
    costs = -torch.eye(2, dtype=torch.float64)
    expected = reference.multi_view_crf(unary.flatten(2), [normalized(matrix, normalization)], [costs], iterations=2)
    kernel = LinkKernel(on(links, device), 1.0, normalization)
    for tracked in (False, True):  # fused, and the differentiable iterations
        arguments = {"smoothness": None, "kernels": [kernel], "iterations": 2}
        got = dense_crf(unary.to(device).requires_grad_(tracked), **arguments)
        torch.testing.assert_close(got.detach().cpu(), expected.reshape(unary.shape))


@pytest.mark.parametrize("matrix", [False, True])
def test_fused_iterations(device, matrix):
    """Inference, whose other kernels run in one operator, and the differentiable iterations: the same marginals."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        unary, image, pairs = views(dtype)
        weight = (randn(CLASSES, CLASSES, seed=4, dtype=dtype) if matrix else torch.full((CLASSES,), 2.0)).to(device)
        kernel = LinkKernel(on(correspondence_links(*pairs), device), weight)
        arguments = {"kernels": [kernel, GaussianKernel(1.0, 0.5)], "iterations": 3}
        fused = dense_crf(unary.to(device), image.to(device), **arguments)
        tracked = dense_crf(unary.to(device).requires_grad_(), image.to(device), **arguments)
        torch.testing.assert_close(fused, tracked.detach(), rtol=0, atol=tolerance)
        assert fused.dtype == dtype
        for output in ("labels", "logits"):
            got = dense_crf(unary.to(device), image.to(device), output=output, **arguments)
            want = fused.argmax(1) if output == "labels" else fused.log()
            got = got if output == "labels" else got.log_softmax(1)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert dense_crf(unary.to(device).half(), kernels=[kernel]).dtype == torch.float16


def test_links_alone(device):
    """No other kernel, started from marginals, one iteration at a time, and until nothing changes."""
    unary, _, pairs = views()
    kernel = LinkKernel(on(correspondence_links(*pairs), device), 1.0, "none")
    matrices = [reference.link_matrix(*pairs)]
    expected = reference.multi_view_crf(unary.flatten(2), matrices, [potts(1.0)], iterations=4).reshape(unary.shape)
    alone = {"smoothness": None, "kernels": dense_crf_kernels(unary.to(device), smoothness=None, kernels=[kernel])}
    got = dense_crf(unary.to(device), iterations=4, **alone)
    torch.testing.assert_close(got.cpu(), expected)
    step = None
    for _ in range(4):
        step = dense_crf(unary.to(device), iterations=1, initial=step, **alone)
    torch.testing.assert_close(step, got)
    torch.testing.assert_close(dense_crf(unary.to(device), iterations=0, **alone).cpu(), (-unary).softmax(1))
    still = dense_crf(unary.to(device), iterations=200, tolerance=1e-9, **alone)
    torch.testing.assert_close(dense_crf(unary.to(device), iterations=1, initial=still, **alone), still)


def test_free_energy(device):
    """Of all images together, counted by image."""
    unary, _, pairs = views()
    kernels = dense_crf_kernels(
        unary.to(device), smoothness=None, kernels=[LinkKernel(on(correspondence_links(*pairs), device), 1.0, "none")]
    )
    q = (-unary).softmax(1)
    matrix = reference.link_matrix(*pairs)
    flat = q.flatten(2).movedim(1, 2).flatten(0, 1)
    expected = (q * unary + torch.xlogy(q, q)).sum() - (flat * (matrix @ flat)).sum() / 2
    torch.testing.assert_close(dense_crf_energy(unary.to(device), q.to(device), kernels).sum().cpu(), expected)


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_gradients(device, normalization):
    """Of marginals with respect to unaries, compatibility and the links' weights, through normalisation."""
    unary, _, (first, second, shape, weights) = views()
    links = correspondence_links(first[:8], second[:8], shape, weights[:8])
    links = on(links, device)

    def marginals(unary, weights, compatibility):
        kernel = LinkKernel(links._replace(weights=weights), compatibility, normalization)
        return dense_crf(unary, smoothness=None, kernels=[kernel], iterations=2)

    inputs = [t.to(device).requires_grad_() for t in (unary, links.weights.detach(), rand(CLASSES, seed=3))]
    assert torch.autograd.gradcheck(marginals, inputs, fast_mode=True)


def test_pixels_without_links(device):
    """They are segmented as if there were no links: finite marginals, whatever the normalisation."""
    unary = randn(2, 3, 3, 3, dtype=torch.float32)
    links = correspondence_links(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2, 2]]), (2, 3, 3))
    plain = dense_crf(unary.to(device), iterations=1)
    for normalization in NORMALIZATIONS:
        kernel = LinkKernel(on(links, device), 4.0, normalization)
        got = dense_crf(unary.to(device), smoothness=None, kernels=[kernel], iterations=3).cpu()
        own = (-unary).softmax(1)
        changed = (got - own).abs().amax(1) > 1e-6
        assert changed.nonzero().tolist() == [[0, 1, 1], [1, 2, 2]]
        both = dense_crf(unary.to(device), kernels=[kernel], iterations=1)
        assert (both - plain).abs().amax(1).gt(1e-6).nonzero().tolist() == [[0, 1, 1], [1, 2, 2]]
        inputs = [unary.to(device).requires_grad_(), links.weights.to(device).requires_grad_()]
        kernel = LinkKernel(on(links, device)._replace(weights=inputs[1]), 4.0, normalization)
        marginals = dense_crf(inputs[0], kernels=[kernel], iterations=2)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(marginals[:, 0].sum(), inputs))


def test_same_bits_for_every_number_of_threads():
    unary = randn(2, 5, 40, 50, dtype=torch.float32)
    image = randn(2, 3, 40, 50, seed=1, dtype=torch.float32) * 30
    generator = torch.Generator().manual_seed(1)
    first, second = ((torch.rand(3000, 3, generator=generator) * torch.tensor([2, 40, 50])).long() for _ in range(2))
    kernel = LinkKernel(correspondence_links(first, second, (2, 40, 50)))
    on_each_number_of_threads(lambda: [dense_crf(unary, image, kernels=[kernel], iterations=2)])


def test_errors(device):
    unary, _, pairs = views()
    links = on(correspondence_links(*pairs), device)
    unary = unary.to(device)
    with pytest.raises(RuntimeError, match=r"links must be for the 40 pixels of unary \[2, 4, 4, 5\], got some for 60"):
        dense_crf(unary[:2], kernels=[LinkKernel(links)])
    with pytest.raises(RuntimeError, match=r"compatibility must be a number, \[4\] or \[4, 4\], got \[3\]"):
        dense_crf(unary, kernels=[LinkKernel(links, torch.ones(3))])
    with pytest.raises(RuntimeError, match="normalization must be one of symmetric, before, after, none, got all"):
        dense_crf(unary, kernels=[LinkKernel(links, normalization="all")])
    with pytest.raises(RuntimeError, match="links must be on cpu like unary, got meta"):
        dense_crf(unary.cpu(), kernels=[LinkKernel(on(links, "meta"))])
    bound = LinkKernel(links).bind(unary)
    assert bound.bind(unary) is bound
    assert dataclasses.is_dataclass(bound)
