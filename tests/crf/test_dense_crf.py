"""dense_crf, dense_crf_energy and the modules against brute force, on both devices."""

import math

import numpy as np
import pytest
import torch
from crf_cases import noisy_unary, on_each_number_of_threads, photo, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st

import pyseg
from pyseg import reference
from pyseg.functional import (
    FeatureKernel,
    GaussianKernel,
    bilateral_features,
    dense_crf,
    dense_crf_energy,
    dense_crf_kernels,
    gaussian_filter,
)

NORMALIZATIONS = ["symmetric", "before", "after", "none"]


def potts(weight, classes):
    return -weight * torch.eye(classes, dtype=torch.float64)


def problem(classes=4, shape=(6, 8), images=2, channels=3, seed=0, dtype=torch.float64):
    """Unaries, and images of few colours, so that lattices are near the exact kernel."""
    unary = randn(images, classes, *shape, seed=seed, dtype=dtype) * 2
    image = torch.randint(0, 3, (images, channels, *shape), generator=torch.Generator().manual_seed(seed)) * 20
    return unary, image


def brute_force(unary, image, smoothness, appearance, normalization="symmetric", sigmas=(3.0, 80.0, 13.0), **arguments):
    """The reference on the two default kernels; compatibilities as costs [C, C]."""
    image = image.double().cpu()
    matrices = [
        reference.pairwise_matrix(bilateral_features(image, *sigmas[1:]).flatten(2), normalization),
        reference.pairwise_matrix(bilateral_features(image[:, :0], sigmas[0]).flatten(2), normalization),
    ]
    costs = [appearance, smoothness]
    unary = unary.double().cpu()
    result = reference.dense_crf(unary.flatten(2), matrices, costs, **arguments)
    return result.reshape(unary.shape)


# ---- against brute force ----


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_exact(device, normalization):
    """accuracy="exact" is the definition, whatever the compatibility."""
    unary, image = problem()
    weights = {"none": (0.1, 0.2)}.get(normalization, (3.0, 10.0))
    vector, matrix = rand(4, seed=3) * weights[0], randn(4, 4, seed=4) * weights[1]
    for smoothness, appearance, costs in (
        (*weights, [potts(w, 4) for w in weights]),
        (vector, matrix, [-torch.diag(vector), matrix]),
    ):
        got = dense_crf(
            unary.to(device), image.to(device), smoothness=smoothness, appearance=appearance, iterations=3,
            normalization=normalization, accuracy="exact", temperature=1.5,
        )  # fmt: skip
        expected = brute_force(unary, image, *costs, normalization, iterations=3, temperature=1.5)
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_lattice(device, normalization):
    """The lattice's levels come near, the finer one nearer; smoothness alone is exact to its truncation."""
    unary, image = problem(dtype=torch.float32)
    weights = {"none": (0.1, 0.2)}.get(normalization, (1.0, 2.0))
    expected = brute_force(unary, image, *[potts(w, 4) for w in weights], normalization, iterations=3)
    arguments = {
        "smoothness": weights[0], "appearance": weights[1], "normalization": normalization, "iterations": 3,
    }  # fmt: skip
    errors = {}
    for accuracy in ("fast", "high"):
        got = dense_crf(unary.to(device), image.to(device), accuracy=accuracy, **arguments)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]))
        errors[accuracy] = (got.cpu() - expected).abs().mean().item()
    assert errors["high"] < 0.85 * errors["fast"]
    assert errors["fast"] < 0.03
    alone = dense_crf(unary.to(device), image.to(device), **{**arguments, "appearance": None}).cpu()
    expected = brute_force(unary, image, potts(weights[0], 4), potts(0.0, 4), normalization, iterations=3)
    torch.testing.assert_close(alone.double(), expected, rtol=0, atol=2e-3)


@settings(max_examples=15)
@given(
    classes=st.integers(2, 5),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    channels=st.integers(0, 4),
    normalization=st.sampled_from(NORMALIZATIONS),
    iterations=st.integers(0, 3),
    sigmas=st.tuples(st.sampled_from([0.5, 3.0]), st.sampled_from([2.0, 80.0]), st.sampled_from([5.0, 50.0])),
    seed=st.integers(0, 2**16),
)
def test_hypothesis(classes, shape, channels, normalization, iterations, sigmas, seed):
    unary, image = problem(classes, tuple(shape), 2, channels, seed)
    got = dense_crf(
        unary, image, iterations=iterations, smoothness=0.5, appearance=0.3, smoothness_sigma=sigmas[0],
        spatial_sigma=sigmas[1], color_sigma=sigmas[2], normalization=normalization, accuracy="exact",
    )  # fmt: skip
    expected = brute_force(
        unary, image, potts(0.5, classes), potts(0.3, classes), normalization, sigmas, iterations=iterations
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigmas", [(1000.0, 0.01), (1e7, 0.3), (0.5, 40.0)])
def test_exact_smoothness_with_unequal_sigmas(device, sigmas):
    """Each axis is filtered as far as the image goes, whatever the other axis takes."""
    unary, _ = problem()
    got = dense_crf(unary.to(device), smoothness=2.0, smoothness_sigma=sigmas, iterations=2, accuracy="exact").cpu()
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    matrix = reference.pairwise_matrix(torch.stack([y / sigmas[0], x / sigmas[1]]).double()[None].flatten(2))
    expected = reference.dense_crf(unary.flatten(2), [matrix], [potts(2.0, 4)], iterations=2)
    torch.testing.assert_close(got.flatten(2), expected, rtol=0, atol=1e-6)


def kernels_of_both_types(unary, image):
    """A kernel in float64 beside one in float32, in both orders."""
    exact = FeatureKernel(bilateral_features(image), 2.0, accuracy="exact").bind(unary)
    fast = FeatureKernel(bilateral_features(image.float()), 1.0).bind(unary.float())
    assert [kernel.compatibility.dtype for kernel in (exact, fast)] == [torch.float64, torch.float32]
    return [exact, fast], [fast, exact]


def test_kernels_of_other_types(device):
    """Kernels that were bound for another type than the unary's: the wider type is computed in, unary's returned."""
    unary, image = problem()
    unary, image = unary.to(device), image.double().to(device)
    for kernels in kernels_of_both_types(unary, image):
        expected = dense_crf(unary, kernels=kernels, smoothness=None, iterations=3)
        assert expected.dtype == torch.float64
        tracked = dense_crf(unary.clone().requires_grad_(), kernels=kernels, smoothness=None, iterations=3)
        torch.testing.assert_close(tracked.detach(), expected)
        narrow = dense_crf(unary.float(), kernels=kernels, smoothness=None, iterations=3)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), expected, rtol=1e-4, atol=1e-5)
        logits = dense_crf(unary, kernels=kernels, smoothness=None, iterations=3, output="logits")
        torch.testing.assert_close(logits.softmax(1), expected)
        energy = dense_crf_energy(unary.float(), narrow, kernels)
        torch.testing.assert_close(energy.double(), dense_crf_energy(unary, expected, kernels), rtol=1e-4, atol=1e-3)
    for bound in (dense_crf_kernels(unary, image), dense_crf_kernels(unary.float(), image.float())):
        results = [dense_crf(u, kernels=bound, smoothness=None) for u in (unary, unary.float())]
        assert [result.dtype for result in results] == [torch.float64, torch.float32]
        torch.testing.assert_close(results[0].float(), results[1], rtol=1e-3, atol=1e-4)


def test_accuracy_of_one_kernel(device):
    """A kernel's own level comes before the call's."""
    unary, image = problem()
    features = bilateral_features(image.double()).to(device)
    unary = unary.float().to(device)
    matrix = reference.pairwise_matrix(features.cpu().flatten(2))
    expected = reference.dense_crf(unary.cpu().flatten(2), [matrix], [potts(2.0, 4)], iterations=2)
    for own, other in (("exact", "fast"), ("fast", "exact"), ("high", "exact")):
        kernel = FeatureKernel(features, 2.0, accuracy=own)
        got = dense_crf(unary, kernels=[kernel], smoothness=None, iterations=2, accuracy=other)
        plain = dense_crf(unary, kernels=[FeatureKernel(features, 2.0)], smoothness=None, iterations=2, accuracy=own)
        assert torch.equal(got, plain)
        (bound,) = dense_crf_kernels(unary, kernels=[kernel], smoothness=None, accuracy=other)
        assert bound.compatibility.dtype == (torch.float64 if own == "exact" else torch.float32)
        if own == "exact":
            torch.testing.assert_close(got.cpu().flatten(2), expected.float(), rtol=0, atol=2e-7)
    smooth = GaussianKernel(2.0, 1.0, accuracy="exact").bind(unary)
    assert smooth.compatibility.dtype == torch.float64
    assert not GaussianKernel(2.0, 1.0, accuracy="high").bind(unary).coarse
    with pytest.raises(RuntimeError, match="accuracy must be one of fast, high, exact, got low"):
        GaussianKernel(2.0, accuracy="low").bind(unary)


def test_sigmas_by_axis_and_channel(device):
    """In the order of the axes and channels."""
    unary, image = problem()
    got = dense_crf(
        unary.to(device), image.to(device), smoothness=None, spatial_sigma=(2.0, 5.0), color_sigma=(9.0, 20.0, 40.0),
        accuracy="exact",
    ).cpu()  # fmt: skip
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    scaled = image / torch.tensor([9.0, 20.0, 40.0]).view(1, 3, 1, 1)
    features = torch.cat([torch.stack([x / 5, y / 2]).expand(2, -1, -1, -1), scaled], 1)
    matrix = reference.pairwise_matrix(features.flatten(2))
    expected = reference.dense_crf(unary.flatten(2), [matrix], [potts(10.0, 4)])
    torch.testing.assert_close(got.flatten(2), expected, rtol=0, atol=1e-6)
    assert torch.equal(bilateral_features(image, (2.0, 5.0), (9.0, 20.0, 40.0))[:, :2], features[:, :2])


def test_further_kernels(device):
    """Any number of them, with normalisations of their own."""
    unary, image = problem()
    features = randn(2, 6, 6, 8, seed=7)
    costs = randn(4, 4, seed=8)
    got = dense_crf(
        unary.to(device),
        kernels=[
            FeatureKernel(features.to(device), 2.0, "after"),
            FeatureKernel(features[:1, :2].to(device), costs),
            GaussianKernel((1.0, 2.0), 0.7, "none"),
        ],
        smoothness=None,
        accuracy="exact",
        iterations=4,
    ).cpu()
    position = bilateral_features(image[:, :0].double(), (1.0, 2.0))
    matrices = [
        reference.pairwise_matrix(features.flatten(2), "after"),
        reference.pairwise_matrix(features[:1, :2].flatten(2)),
        reference.pairwise_matrix(position.flatten(2), "none"),
    ]
    expected = reference.dense_crf(
        unary.flatten(2), matrices, [potts(2.0, 4), costs, potts(0.7, 4)], iterations=4
    ).reshape(unary.shape)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_axes_and_channels(device, dims):
    """Lines, images and volumes, grey or with as many channels as fit eight dimensions."""
    shape = {1: (30,), 2: (5, 7), 3: (3, 4, 5)}[dims]
    for channels in (1, 8 - dims):
        unary, image = problem(3, shape, 1, channels, dtype=torch.float32)
        got = dense_crf(unary.to(device), image.to(device), smoothness=1.0, appearance=1.0).cpu()
        expected = brute_force(unary, image, potts(1.0, 3), potts(1.0, 3), iterations=5)
        assert (got - expected).abs().mean() < 0.05
    unary, image = problem(3, shape, 1, 9 - dims, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"features must have at most 8 dimensions .* got 9"):
        dense_crf(unary, image)


def test_many_classes(device):
    unary = randn(1, 150, 6, 7, dtype=torch.float32).to(device)
    image = problem(shape=(6, 7), images=1)[1].to(device)
    got = dense_crf(unary, image)
    torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]))


# ---- what it returns ----


def test_outputs(device):
    unary, image = problem()
    arguments = (unary.to(device), image.to(device))
    marginals = dense_crf(*arguments)
    labels = dense_crf(*arguments, output="labels")
    assert labels.dtype == torch.int64
    assert torch.equal(labels, marginals.argmax(1))
    logits = dense_crf(*arguments, output="logits")
    torch.testing.assert_close(logits.softmax(1), marginals)
    start = dense_crf(*arguments, iterations=0)
    torch.testing.assert_close(start, (-arguments[0]).softmax(1))
    torch.testing.assert_close(dense_crf(*arguments, iterations=0, output="logits").softmax(1), start)


def test_list_of_sizes(device):
    """Each image as by itself."""
    sizes = ((5, 7), (9, 4), (6, 6))
    pairs = [problem(3, size, 1, seed=i, dtype=torch.float32) for i, size in enumerate(sizes)]
    unaries, images = [p[0][0].to(device) for p in pairs], [p[1][0].to(device) for p in pairs]
    starts = [u.softmax(0) for u in unaries]
    for extra in ({}, {"output": "labels"}, {"initial": starts}):
        got = dense_crf(unaries, images, **extra)
        assert isinstance(got, list)
        for i in range(3):
            one = {name: value if name == "output" else value[i][None] for name, value in extra.items()}
            assert torch.equal(got[i], dense_crf(unaries[i][None], images[i][None], **one)[0])
    assert len(dense_crf(unaries)) == 3
    assert dense_crf([], []) == []


def test_batch_is_images_by_themselves(device):
    unary, image = problem(images=3, dtype=torch.float32)
    batch = dense_crf(unary.to(device), image.to(device))
    for n in range(3):
        one = dense_crf(unary[n : n + 1].to(device), image[n : n + 1].to(device))
        torch.testing.assert_close(batch[n : n + 1], one, rtol=1e-4, atol=1e-5)
    assert dense_crf(unary[:0].to(device), image[:0].to(device)).shape == (0, 4, 6, 8)


def test_steps_and_tolerance(device):
    """Kernels that are built once serve single steps, which add up; the stop criterion stops."""
    unary, image = problem()
    unary, image = unary.to(device), image.to(device)
    kernels = dense_crf_kernels(unary, image)
    marginals = dense_crf(unary, image, iterations=0)
    changes = []
    for _ in range(4):
        before = marginals
        marginals = dense_crf(unary, kernels=kernels, smoothness=None, iterations=1, initial=marginals)
        changes.append((marginals - before).abs().amax(1).mean().item())
    torch.testing.assert_close(marginals, dense_crf(unary, image, iterations=4))
    stop = (changes[1] + changes[2]) / 2
    assert changes[0] > changes[1] > stop > changes[2]
    stopped = dense_crf(unary, image, iterations=50, tolerance=stop)
    torch.testing.assert_close(stopped, dense_crf(unary, image, iterations=3))
    torch.testing.assert_close(
        dense_crf(unary, image, iterations=2, tolerance=0.0), dense_crf(unary, image, iterations=2)
    )


def test_energy(device):
    """Against brute force, and lowered by mean field."""
    unary, image = problem()
    kernels = dense_crf_kernels(unary.to(device), image.to(device), accuracy="exact", smoothness=0.3, appearance=0.5)
    matrices = [
        reference.pairwise_matrix(bilateral_features(image.double()).flatten(2)),
        reference.pairwise_matrix(bilateral_features(image[:, :0].double(), 3.0).flatten(2)),
    ]
    previous = torch.full((2,), torch.inf, dtype=torch.float64)
    for iterations in (0, 1, 2, 5):
        marginals = dense_crf(
            unary.to(device), kernels=kernels, smoothness=None, iterations=iterations, temperature=0.8
        )
        got = dense_crf_energy(unary.to(device), marginals, kernels, temperature=0.8).cpu()
        expected = reference.dense_crf_energy(
            unary.flatten(2), marginals.cpu().flatten(2), matrices, [potts(0.5, 4), potts(0.3, 4)], temperature=0.8
        )
        torch.testing.assert_close(got, expected)
        assert (got < previous).all()
        previous = got


def test_energy_of_excluded_labels(device):
    """Infinite unaries cost nothing where the label has no probability; everything where it has some."""
    unary, image = problem()
    kernels = dense_crf_kernels(unary.to(device), image.to(device))
    excluded = unary.clone()
    excluded[0, 1, 2:4] = torch.inf
    marginals = dense_crf(excluded.to(device), kernels=kernels, smoothness=None)
    assert (marginals[0, 1, 2:4] == 0).all()
    expected = dense_crf_energy(unary.to(device), marginals, kernels)
    assert expected.isfinite().all()
    own = excluded.to(device).requires_grad_()
    got = dense_crf_energy(own, marginals, kernels)
    torch.testing.assert_close(got.detach(), expected)
    (grad,) = torch.autograd.grad(got.sum(), own)
    torch.testing.assert_close(grad, marginals)
    assert torch.equal(
        dense_crf_energy(excluded.to(device), unary.to(device).softmax(1), kernels).cpu() == torch.inf,
        torch.tensor([True, False]),
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_logits_without_iterations(device, requires_grad):
    """The unaries, also where marginals are rounded to 0; with marginals to start from their logarithm."""
    unary, image = problem()
    unary = (unary * 200).to(device).requires_grad_(requires_grad)
    got = dense_crf(unary, image.to(device), iterations=0, output="logits", temperature=2.0)
    assert torch.equal(got, -unary / 2)
    if requires_grad:
        (grad,) = torch.autograd.grad(got.logsumexp(1).sum(), unary)
        assert grad.isfinite().all()
    initial = rand(2, 4, 6, 8).to(device)
    got = dense_crf(unary, image.to(device), iterations=0, output="logits", initial=initial)
    torch.testing.assert_close(got, initial.log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types_are_rounded_once(device, dtype):
    """Whatever is asked for is what float32 gives, rounded."""
    unary, image = problem(dtype=torch.float32)
    unary, image = unary.to(device, dtype), image.to(device)
    for extra in ({}, {"tolerance": 0.0}, {"output": "logits"}, {"initial": rand(2, 4, 6, 8).to(device, dtype)}):
        wide = {name: value.float() if name == "initial" else value for name, value in extra.items()}
        assert torch.equal(dense_crf(unary, image, **extra), dense_crf(unary.float(), image, **wide).to(dtype))
    assert torch.equal(dense_crf(unary, image, output="labels"), dense_crf(unary.float(), image, output="labels"))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1e8, 1e30])
def test_extreme_temperatures(device, requires_grad, temperature):
    unary, image = problem(dtype=torch.float32)
    unary = unary.to(device).requires_grad_(requires_grad)
    got = dense_crf(unary, image.to(device), temperature=temperature).detach()
    assert got.isfinite().all()
    torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]))
    if temperature > 1:
        torch.testing.assert_close(got, torch.full_like(got, 0.25))
    else:
        assert ((got == 0) | (got == 1)).all()


def test_numbers_of_other_libraries(device):
    unary, image = problem()
    unary, image = unary.to(device), image.to(device)
    expected = dense_crf(unary, image, smoothness_sigma=2.0)
    for number in (np.float32(2), np.array(2.0), torch.tensor(2.0), np.int64(2), np.array([2.0, 2]), torch.ones(2) * 2):
        assert torch.equal(dense_crf(unary, image, smoothness_sigma=number), expected)
        assert torch.equal(gaussian_filter(unary, number), gaussian_filter(unary, 2.0))
    got = dense_crf(
        unary, image, smoothness=np.float32(3), appearance=torch.tensor(10.0), spatial_sigma=np.float32(80),
        color_sigma=torch.tensor(13), smoothness_sigma=2.0,
    )  # fmt: skip
    assert torch.equal(got, expected)


# ---- gradients ----


@pytest.mark.parametrize("accuracy", ["fast", "high"])
def test_differentiable_iterations_are_the_fused_ones(device, accuracy):
    unary, image = problem()
    for extra in ({}, {"output": "logits"}, {"initial": rand(2, 4, 6, 8).to(device)}, {"iterations": 0}):
        fused = dense_crf(unary.to(device), image.to(device), accuracy=accuracy, **extra)
        loop = dense_crf(unary.to(device).requires_grad_(), image.to(device), accuracy=accuracy, **extra)
        assert loop.requires_grad
        torch.testing.assert_close(fused, loop.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
def test_gradcheck(device, accuracy):
    """Unaries, marginals to start from, compatibilities of each kind, features and image, through all iterations."""
    unary, image = problem(3, (3, 4), 1)
    image = (image + randn(*image.shape, seed=1)).to(device)  # off the faces of simplices
    tensors = (
        unary.to(device),
        torch.tensor(0.7, dtype=torch.float64, device=device),
        randn(3, 3, seed=2).to(device),
        rand(3, seed=3).to(device),
        rand(1, 3, 3, 4, seed=4).softmax(1).to(device),
        image,
    )

    def function(unary, smoothness, appearance, further, initial, image):
        kernel = FeatureKernel(bilateral_features(image * 0.7, 3.0, 20.0), further)
        return dense_crf(
            unary, image, smoothness=smoothness, appearance=appearance, kernels=[kernel], iterations=2,
            initial=initial, accuracy=accuracy, color_sigma=20.0,
        )  # fmt: skip

    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-5, nondet_tol=1e-12, fast_mode=True)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_by_accuracy(device, normalization):
    """Those of the high level are near those of the exact kernel."""
    unary, image = problem()
    upstream = randn(4, 6, 8, seed=3).to(device)
    gradients = []
    for accuracy in ("high", "exact"):
        u = unary.to(device).requires_grad_()
        marginals = dense_crf(
            u, image.to(device), smoothness=0.5, appearance=0.2, accuracy=accuracy, normalization=normalization,
            iterations=2,
        )  # fmt: skip
        gradients.append(torch.autograd.grad((marginals * upstream).sum(), u)[0])
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


def test_gradient_in_narrow_types(device):
    unary, image = problem(dtype=torch.float32)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        u = unary.to(device, dtype).requires_grad_()
        marginals = dense_crf(u, image.to(device), smoothness=0.5, appearance=0.5, iterations=2)
        assert marginals.dtype == dtype
        grads.append(torch.autograd.grad(marginals[:, 0].sum(), u)[0])
        assert grads[-1].dtype == dtype
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


# ---- the contract ----


def test_same_bits_for_every_number_of_threads():
    image = photo("coffee", 90, 70)
    unary = noisy_unary(5, 70, 90).float()

    def run():
        tensors = [unary.clone(), torch.tensor(3.0), 1 - torch.eye(5)]
        for tensor in tensors:
            tensor.requires_grad_()
        marginals = dense_crf(tensors[0], image, smoothness=tensors[1], appearance=tensors[2], iterations=2)
        grads = torch.autograd.grad(marginals[:, 1].square().sum(), tensors)
        return [dense_crf(unary, image), marginals.detach(), *grads]

    on_each_number_of_threads(run)


def test_autocast(device):
    """Computes in the type of the unaries, float32 for narrow ones."""
    unary, image = problem(dtype=torch.float32)
    unary, image = unary.to(device), image.to(device)
    expected = dense_crf(unary, image)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(dense_crf(unary, image), expected)
        tracked = dense_crf(unary.clone().requires_grad_(), image)
        assert tracked.dtype == torch.float32
        torch.testing.assert_close(tracked.detach(), expected, rtol=1e-4, atol=1e-5)
        assert dense_crf(unary.bfloat16(), image).dtype == torch.bfloat16


def test_inference_mode(device):
    unary, image = problem(dtype=torch.float32)
    with torch.inference_mode():
        got = dense_crf(unary.to(device), image.to(device))
    assert torch.equal(got, dense_crf(unary.to(device), image.to(device)))


def test_vmap_over_unaries(device):
    """Of one image, where a gradient is wanted: the filters batch."""
    unary, image = problem(images=1)
    kernels = dense_crf_kernels(unary.to(device), image.to(device))
    unaries = torch.stack([unary, unary.flip(1)]).to(device).requires_grad_()

    def one(u):
        energy = dense_crf_energy(u, u.softmax(1), kernels)
        return energy.sum()

    got = torch.vmap(one)(unaries)
    torch.testing.assert_close(got, torch.stack([one(u) for u in unaries]))


U, K = (1, 3, 4, 5), (1, 2, 4, 5)


@pytest.mark.parametrize(
    ("unary", "image", "arguments", "message"),
    [
        ((3, 4), None, {}, r"unary must be \[N, C, \*S\] with S of 1 to 3 axes, got \[3, 4\]"),
        ((1, 1, 4, 5), None, {}, r"unary must have at least two classes, got \[1, 1, 4, 5\]"),
        ((1, 3, 0, 5), None, {}, r"unary must have pixels, got \[1, 3, 0, 5\]"),
        (U, (1, 2, 4, 6), {}, r"image must be \[1, K, 4, 5\] for unary .*, got \[1, 2, 4, 6\]"),
        (U, (2, 4, 5), {}, r"image must be \[1, K, 4, 5\] for unary .*, got \[2, 4, 5\]"),
        (U, (2, 2, 4, 5), {}, r"image must be \[1, K, 4, 5\] for unary .*, got \[2, 2, 4, 5\]"),
        (U, K, {"smoothness_sigma": 0.0}, "smoothness_sigma must be positive and finite, got 0.0"),
        (U, K, {"spatial_sigma": -1.0}, "spatial_sigma must be positive and finite, got -1.0"),
        (U, K, {"color_sigma": (1.0, math.nan)}, "color_sigma must be positive and finite, got"),
        (U, K, {"color_sigma": (1.0,)}, "color_sigma must be a number or one for each of the 2 channels of image, got"),
        (U, K, {"spatial_sigma": (1.0,)}, "spatial_sigma must be a number or one for each of the 2 axes of image, got"),
        (U, K, {"iterations": -1}, "iterations must not be negative, got -1"),
        (U, K, {"temperature": 0.0}, "temperature must be from 1e-30 to 1e30, got 0.0"),
        (U, K, {"temperature": 1e-40}, "temperature must be from 1e-30 to 1e30, got 1e-40"),
        (U, K, {"tolerance": -0.1}, "tolerance must not be negative, got -0.1"),
        (U, K, {"normalization": "both"}, "normalization must be one of symmetric, before, after, none, got both"),
        (U, K, {"accuracy": "low"}, "accuracy must be one of fast, high, exact, got low"),
        (U, K, {"output": "map"}, "output must be one of marginals, labels, logits, got map"),
        (U, K, {"appearance": torch.ones(2)}, r"compatibility must be a number, \[3\] or \[3, 3\], got \[2\]"),
        (U, K, {"initial": torch.ones(1, 3, 4, 4)}, r"initial must be \[1, 3, 4, 5\] like unary, got \[1, 3, 4, 4\]"),
        (U, K, {"initial": [torch.ones(3, 4, 4)]}, "initial must be a tensor like unary, got list"),
        (U, K, {"kernels": [FeatureKernel(torch.ones(1, 2, 4, 4))]}, r"features must be \[1, d, 4, 5\], got"),
        (U, K, {"kernels": [GaussianKernel(0.0)]}, "sigma must be positive and finite, got 0.0"),
    ],
)  # fmt: skip
def test_errors(device, unary, image, arguments, message):
    image = None if image is None else torch.zeros(image, device=device)
    with pytest.raises(RuntimeError, match=message):
        dense_crf(torch.zeros(unary, device=device), image, **arguments)


def test_more_errors():
    with pytest.raises(RuntimeError, match="unary must be of floating point, got torch.int64"):
        dense_crf(torch.zeros(U, dtype=torch.int64))
    for requires_grad in (False, True):
        unary = torch.zeros(U)
        unary[0, 1, 2, 3] = float("nan")
        with pytest.raises(RuntimeError, match="unary must not be NaN"):
            dense_crf(unary.requires_grad_(requires_grad))
    with pytest.raises(RuntimeError, match="image must be of real numbers, got torch.complex64"):
        dense_crf(torch.zeros(U), torch.zeros(K, dtype=torch.complex64))
    unaries = [torch.zeros(3, 4, 5)] * 2
    with pytest.raises(RuntimeError, match="image must be a list of 2 like unary, got 1"):
        dense_crf(unaries, unaries[:1])
    with pytest.raises(RuntimeError, match="image must be a list of 2 like unary, got a tensor"):
        dense_crf(unaries, torch.zeros(2, 3, 4, 5))
    with pytest.raises(RuntimeError, match=r"marginals must be \[1, 3, 4, 5\] like unary, got \[1, 3, 4, 4\]"):
        dense_crf_energy(torch.zeros(U), torch.zeros(1, 3, 4, 4), [])
    with pytest.raises(RuntimeError, match="spatial_sigma must be positive"):
        bilateral_features(torch.zeros(K), 0.0)


# ---- modules ----


def test_module(device):
    unary, image = problem(dtype=torch.float32)
    logits, image = -unary.to(device), image.to(device)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = pyseg.nn.DenseCRF(iterations=3, appearance=weights, color_sigma=20.0).to(device)
    energies = -logits.log_softmax(1)
    expected = dense_crf(energies, image, iterations=3, appearance=weights.to(device), color_sigma=20.0)
    assert torch.equal(module(logits, image), expected)
    assert set(module.state_dict()) == {"appearance"}
    assert not list(module.parameters())
    plain = pyseg.nn.DenseCRF(from_logits=False, output="labels")
    assert torch.equal(plain(energies, image), dense_crf(energies, image, output="labels"))
    for got, one in zip(module(list(logits), list(image)), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-5)
    assert "iterations=3" in repr(module)


def test_crf_as_rnn(device):
    """Starts as the fixed CRF with the paper's parameters, in training and in eval mode, and learns."""
    unary, image = problem(dtype=torch.float32)
    logits, image = -unary.to(device), image.to(device)
    module = pyseg.nn.CRFasRNN(4, color_sigma=20.0).to(device)
    for training, iterations in ((True, 5), (False, 10)):
        module.train(training)
        expected = dense_crf(
            -logits, image, iterations=iterations, smoothness=3.0, appearance=5.0, spatial_sigma=160.0,
            color_sigma=20.0, normalization="after",
        )  # fmt: skip
        torch.testing.assert_close(module(logits, image).softmax(1), expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module(logits, image).softmax(1), expected, rtol=1e-3, atol=1e-4)
    assert {name: list(p.shape) for name, p in module.named_parameters()} == {
        "appearance": [4], "smoothness": [4], "compatibility": [4, 4],
    }  # fmt: skip
    module.train()
    target = logits.argmax(1)  # so that weights should fall
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(module(logits, image), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(RuntimeError, match="CRFasRNN: num_classes must be at least 2, got 1"):
        pyseg.nn.CRFasRNN(1)


def test_crf_as_rnn_infers_what_it_was_trained_for():
    """On a map that is large enough for the coarse grid, with weights that amplify any difference."""
    image, unary = photo("coffee", 64, 48), noisy_unary(6, 48, 64).float()
    module = pyseg.nn.CRFasRNN(6, color_sigma=20.0, smoothness=12.0, appearance=20.0, eval_iterations=5)
    trained = module(-4 * unary, image).detach().softmax(1)
    with torch.no_grad():
        inferred = module.eval()(-4 * unary, image).softmax(1)
    torch.testing.assert_close(inferred, trained, rtol=0, atol=2e-4)


def test_it_cleans_a_noisy_mask():
    """What it is for: a mask of a photograph with noise is nearer to the clean one afterwards."""
    image = photo("coffee", 96, 64)
    clean = image.float().mean(1) > image.float().mean()
    noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < 0.25
    noisy = clean ^ noise
    unary = torch.stack([torch.where(noisy, 1.2, 0.36), torch.where(noisy, 0.36, 1.2)], 1)
    for accuracy in ("fast", "high"):
        refined = dense_crf(unary, image, accuracy=accuracy, output="labels").bool()
        assert (refined != clean).float().mean() < 0.4 * (noisy != clean).float().mean()
