"""Mean field inference in fully connected conditional random fields."""

import contextlib
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pyseg._ops import mean_field as _op  # noqa: F401  registers the fake kernel
from pyseg._ops.forward_mode import refuse_tangents
from pyseg.functional.pairwise_kernels import (
    ACCURACIES,
    NORMALIZATIONS,
    TRUNCATE,
    Bound,
    BoundGaussian,
    BoundLattice,
    BoundLinks,
    Compatibility,
    CrfAccuracy,
    FeatureKernel,
    GaussianKernel,
    LinkKernel,
    Normalization,
    bilateral_features,
    chosen,
    computing_type,
    positive,
)

Kernel = GaussianKernel | FeatureKernel | LinkKernel | Bound
Sigma = float | Sequence[float]
Output = Literal["marginals", "labels", "logits"]
_OUTPUTS = ("marginals", "labels", "logits")


@overload
def dense_crf(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    iterations: int = 5,
    smoothness: Compatibility | None = 3.0,
    smoothness_sigma: Sigma = 3.0,
    appearance: Compatibility | None = 10.0,
    spatial_sigma: Sigma = 80.0,
    color_sigma: Sigma = 13.0,
    kernels: Sequence[Kernel] = (),
    normalization: Normalization = "symmetric",
    accuracy: CrfAccuracy = "fast",
    temperature: float = 1.0,
    initial: Tensor | None = None,
    tolerance: float | None = None,
    output: Output = "marginals",
) -> Tensor: ...
@overload
def dense_crf(
    unary: Sequence[Tensor],
    image: Sequence[Tensor] | None = None,
    *,
    iterations: int = 5,
    smoothness: Compatibility | None = 3.0,
    smoothness_sigma: Sigma = 3.0,
    appearance: Compatibility | None = 10.0,
    spatial_sigma: Sigma = 80.0,
    color_sigma: Sigma = 13.0,
    kernels: Sequence[Kernel] = (),
    normalization: Normalization = "symmetric",
    accuracy: CrfAccuracy = "fast",
    temperature: float = 1.0,
    initial: Sequence[Tensor] | None = None,
    tolerance: float | None = None,
    output: Output = "marginals",
) -> list[Tensor]: ...
def dense_crf(
    unary: Tensor | Sequence[Tensor],
    image: Tensor | Sequence[Tensor] | None = None,
    *,
    iterations: int = 5,
    smoothness: Compatibility | None = 3.0,
    smoothness_sigma: Sigma = 3.0,
    appearance: Compatibility | None = 10.0,
    spatial_sigma: Sigma = 80.0,
    color_sigma: Sigma = 13.0,
    kernels: Sequence[Kernel] = (),
    normalization: Normalization = "symmetric",
    accuracy: CrfAccuracy = "fast",
    temperature: float = 1.0,
    initial: Tensor | Sequence[Tensor] | None = None,
    tolerance: float | None = None,
    output: Output = "marginals",
) -> Tensor | list[Tensor]:
    r"""Marginals of a fully connected CRF by mean field (Kraehenbuehl and Koltun 2011, 1210.5644, algorithm 1).

        Q_i(l) <- softmax over l of -(U_i(l) + sum over kernels m of E_m,i(l)) / temperature
        E_m,i(l) = sum over labels l' of mu_m(l, l') sum over j of k_m(i, j) Q_j(l')

    `iterations` times, from Q = softmax(-U / temperature). The kernels are

        smoothness   exp(-|p_i - p_j|^2 / (2 smoothness_sigma^2)),          a separable filter,
        appearance   exp(-|p_i - p_j|^2 / (2 spatial_sigma^2) - |I_i - I_j|^2 / (2 color_sigma^2)),
                     on a permutohedral lattice (Adams, Baek, Davis 2010),

    and any further ones. As in the authors' program the sum over j includes i. The lattice of an image is built once
    and serves all classes and iterations; softmax, compatibility and unary are one fused step.

    Args:
        unary: [N, C, *S] energies, -log of probabilities, S of one to three axes, C at least 2; or a list of
            [C, *S_n], images of different sizes. float32, float64, or float16 and bfloat16 (computed with in float32).
        image: [N, K, *S], or a list of [K, *S_n], of any real type: what the appearance kernel compares, K up to 8
            minus the number of axes. None: no appearance kernel.
        smoothness, appearance: compatibility of the two kernels, None to leave one out. A number w: Potts, a label
            gains w times the message of its own; [C]: likewise with a weight for each label; [C, C]: costs mu.
        smoothness_sigma, spatial_sigma: in pixels, one number or one for each axis.
        color_sigma: in units of the image, one number or one for each channel; 13 suits values from 0 to 255.
        kernels: further ones: `GaussianKernel`, `FeatureKernel`, `LinkKernel` (which may link images of the batch), or
            what `dense_crf_kernels` returned.
        normalization: of each kernel by its sums n_i = sum over j of k(i, j): "symmetric" k / sqrt(n_i n_j), "before"
            k / n_j, "after" k / n_i (weights that sum to one), "none".
        accuracy: "fast": lattice with blur passes; on the CPU the smoothness kernel beside it is filtered on a grid of
            every second pixel where its sigma is at least 3 and the image at least 32 x 32. Five iterations on
            photographs change by 8e-5 in the mean and 1e-2 at the most, less than a tenth of the lattice's own errors.
            "high": finer lattice with an exact kernel between its vertices. "exact": all pairs in float64, O(|S|^2):
            for small maps.
        temperature: of the softmax, from 1e-30 to 1e30.
        initial: marginals to start from, like `unary`.
        tolerance: stop when an iteration changes marginals by less than this, in the mean over pixels of the largest
            change over labels; looked at after each iteration, which waits for a CUDA device.
        output: "marginals", "labels" (the most probable, int64 [N, *S]) or "logits" (-energy / temperature, whose
            softmax the marginals are; without iterations -unary / temperature, or the logarithm of `initial`).

    Returns:
        [N, C, *S] like `unary`, or labels; a list for a list.

    Everything is computed in float32, or in float64 where unary or a kernel is of it (accuracy="exact", and what
    `dense_crf_kernels` bound for a unary of float64), and rounded to unary's type once; a kernel's messages have the
    precision that it was bound with.

    Gradients with respect to unary, initial, compatibilities and, through lattice and normalisation, features and
    image: where one is wanted, the iterations run as differentiable operators, with the same result but for that grid.
    The same bits for every number of threads; on CUDA no synchronisation but that of building a lattice.
    O(iterations N |S| C (d + sigma)) time.

    Raises:
        RuntimeError: shapes, types, devices or parameters that do not fit, fewer than two classes, no pixels, a NaN in
            `unary` (on the CPU; on CUDA it makes NaN).
    """
    chosen(output, "output", _OUTPUTS)

    def one(unary: Tensor, image: Tensor | None, initial: Tensor | None) -> Tensor:
        _check_run(unary, iterations, temperature, initial, tolerance)
        refuse_tangents("dense_crf", image)
        with _without_autocast(unary):
            wide = unary.to(computing_type(unary, "fast"))  # rounded once, at the end
            bound = dense_crf_kernels(
                wide,
                image,
                smoothness=smoothness,
                smoothness_sigma=smoothness_sigma,
                appearance=appearance,
                spatial_sigma=spatial_sigma,
                color_sigma=color_sigma,
                kernels=kernels,
                normalization=normalization,
                accuracy=accuracy,
            )
            result = _mean_field(wide, bound, iterations, temperature, initial, tolerance, output == "logits")
        return result.argmax(1) if output == "labels" else result.to(unary.dtype)

    if isinstance(unary, Tensor):
        return one(unary, _tensor("image", image), _tensor("initial", initial))
    return [
        one(u[None], None if i is None else i[None], None if q is None else q[None])[0]
        for u, i, q in zip(unary, _list("image", image, len(unary)), _list("initial", initial, len(unary)), strict=True)
    ]


def dense_crf_kernels(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    smoothness: Compatibility | None = 3.0,
    smoothness_sigma: Sigma = 3.0,
    appearance: Compatibility | None = 10.0,
    spatial_sigma: Sigma = 80.0,
    color_sigma: Sigma = 13.0,
    kernels: Sequence[Kernel] = (),
    normalization: Normalization = "symmetric",
    accuracy: CrfAccuracy = "fast",
) -> tuple[Bound, ...]:
    r"""The kernels of `dense_crf` with lattices, normalisations and costs computed: for calls that share them.

        kernels = dense_crf_kernels(unary, image)
        for _ in range(10):
            marginals = dense_crf(unary, kernels=kernels, smoothness=None, iterations=1, initial=marginals)

    Arguments are those of `dense_crf`; of `unary` [N, C, *S] only shape, type and device count.
    """
    _check_unary(unary)
    chosen(normalization, "normalization", NORMALIZATIONS)
    chosen(accuracy, "accuracy", ACCURACIES)
    wanted: list[Kernel] = []
    if image is not None and appearance is not None:
        _check_image(unary, image)
        axes = unary.dim() - 2
        features = bilateral_features(
            image if image.dtype == torch.float64 else image.to(computing_type(unary, accuracy)),
            positive("spatial_sigma", spatial_sigma, axes, "axes of image"),
            positive("color_sigma", color_sigma, image.shape[1], "channels of image"),
        )
        wanted.append(FeatureKernel(features, appearance))
    wanted += kernels
    if smoothness is not None:
        sigmas = positive("smoothness_sigma", smoothness_sigma, unary.dim() - 2, "axes of unary")
        wanted.append(GaussianKernel(sigmas, smoothness))
    return tuple(kernel.bind(unary, normalization, accuracy) for kernel in wanted)


def dense_crf_energy(unary: Tensor, marginals: Tensor, kernels: Sequence[Bound], *, temperature: float = 1.0) -> Tensor:
    r"""Free energy of marginals, what mean field lowers: D(Q || P) but for a constant (1210.5644, section 3).

        F = sum over i, l of Q_i(l) (U_i(l) + 1/2 sum over m of E_m,i(l) + temperature log Q_i(l))

    unary, marginals: [N, C, *S]; kernels: of `dense_crf_kernels`. Returns [N]. All pixels are updated at once, so an
    iteration may raise it. Differentiable.
    """
    _check_unary(unary)
    if marginals.shape != unary.shape:
        raise RuntimeError(
            f"dense_crf_energy: marginals must be {list(unary.shape)} like unary, got {list(marginals.shape)}"
        )
    with _without_autocast(unary):
        dtype = _loop_type(unary, kernels)
        q = marginals.to(dtype)
        pairwise = sum((kernel.energy(q) for kernel in kernels), torch.zeros_like(q))
        energy = finite_where(q, unary.to(dtype)) + pairwise / 2
        return (q * energy + temperature * torch.special.xlogy(q, q)).flatten(1).sum(1)


def finite_where(marginals: Tensor, unary: Tensor) -> Tensor:
    """Energies without the infinite ones of labels that are excluded: 0 times infinity is no energy."""
    return unary.masked_fill((marginals == 0) & unary.isposinf(), 0)


# ---- iterations ----


def _mean_field(
    unary: Tensor,
    kernels: Sequence[Bound],
    iterations: int,
    temperature: float,
    initial: Tensor | None,
    tolerance: float | None,
    logits: bool,
) -> Tensor:
    tensors = [unary, initial, *_tensors(kernels)]
    refuse_tangents("dense_crf", *tensors)
    fused = all(_fusible(kernel, unary) for kernel in kernels) and not _wants_gradient(tensors)
    step = _fused if fused else _differentiable
    last = 1 if logits and iterations > 0 else 0
    if tolerance is None:
        marginals = step(unary, kernels, iterations - last, temperature, initial)
    else:
        marginals = step(unary, kernels, 0, temperature, initial)
        for _ in range(iterations - last):
            before, marginals = marginals, step(unary, kernels, 1, temperature, marginals)
            if (marginals - before).abs().amax(1).mean().item() < tolerance:
                break
    if not logits:
        return marginals
    if iterations == 0:
        return -unary / temperature if initial is None else marginals.log()
    return -_energy(unary.to(_loop_type(unary, kernels)), kernels, marginals) / temperature


def _fusible(kernel: Bound, unary: Tensor) -> bool:
    known = isinstance(kernel, BoundLattice | BoundLinks)
    if isinstance(kernel, BoundGaussian):
        known = set(kernel.truncate) == {TRUNCATE}
    return known and kernel.compatibility.dtype == computing_type(unary, "fast")


def _energy(unary: Tensor, kernels: Sequence[Bound], marginals: Tensor) -> Tensor:
    for kernel in kernels:
        unary = unary + kernel.energy(marginals)
    return unary


def _differentiable(
    unary: Tensor, kernels: Sequence[Bound], iterations: int, temperature: float, initial: Tensor | None
) -> Tensor:
    dtype = _loop_type(unary, kernels)
    unary = unary.to(dtype)
    marginals = _softmax(unary, temperature) if initial is None else initial.to(dtype)
    for _ in range(iterations):
        marginals = _softmax(_energy(unary, kernels, marginals), temperature)
    return marginals


def _softmax(energy: Tensor, temperature: float) -> Tensor:
    marginals: Tensor = torch.ops.pyseg._mean_field(energy, None, 0, temperature, [], [], TRUNCATE, False, [], [], [])
    return marginals


def _fused(
    unary: Tensor, kernels: Sequence[Bound], iterations: int, temperature: float, initial: Tensor | None
) -> Tensor:
    """Links lead from image to image: their energies join the unaries before each iteration of the other kernels."""
    links = [kernel.scaled() for kernel in kernels if isinstance(kernel, BoundLinks)]
    others = [kernel for kernel in kernels if not isinstance(kernel, BoundLinks)]
    if not links or iterations == 0:
        return _fused_iterations(unary, others, iterations, temperature, initial)
    marginals = _softmax(unary, temperature) if initial is None else initial.to(unary.dtype)
    for _ in range(iterations):
        energy = unary
        for kernel in links:
            energy = kernel.add_energy(energy, marginals)
        marginals = _fused_iterations(energy, others, 1, temperature, marginals)
    return marginals


def _fused_iterations(
    unary: Tensor, kernels: Sequence[Bound], iterations: int, temperature: float, initial: Tensor | None
) -> Tensor:
    lattices = [kernel for kernel in kernels if isinstance(kernel, BoundLattice)]
    gaussians = [kernel for kernel in kernels if isinstance(kernel, BoundGaussian)]
    ordered: list[Bound] = [*lattices, *gaussians]
    none = unary.new_empty(0, dtype=computing_type(unary, "fast"))
    marginals: Tensor = torch.ops.pyseg._mean_field(
        unary,
        None if initial is None else initial.to(unary.dtype),
        iterations,
        temperature,
        [tensor for kernel in lattices for tensor in kernel.lattice[:9]],
        [sigma for kernel in gaussians for sigma in kernel.sigma],
        TRUNCATE,
        bool(lattices) and all(kernel.coarse for kernel in gaussians),  # a lattice errs by far more
        [none if kernel.scale_in is None else kernel.scale_in for kernel in ordered],
        [none if kernel.scale_out is None else kernel.scale_out for kernel in ordered],
        [kernel.compatibility for kernel in ordered],
    )
    return marginals


def _loop_type(unary: Tensor, kernels: Sequence[Bound]) -> torch.dtype:
    """The widest type of unary and kernels, each of which computes its message in its own."""
    types = [computing_type(unary, "fast"), *[kernel.compatibility.dtype for kernel in kernels]]
    return torch.float64 if torch.float64 in types else torch.float32


def _tensors(kernels: Sequence[Bound]) -> list[Tensor | None]:
    """What of kernels may have a gradient."""
    tensors: list[Tensor | None] = []
    for kernel in kernels:
        tensors += [kernel.compatibility, kernel.scale_in, kernel.scale_out]
        if isinstance(kernel, BoundLattice):
            tensors.append(kernel.lattice.weight)
        if isinstance(kernel, BoundLinks):
            tensors.append(kernel.links.weights)
    return tensors


def _wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _without_autocast(unary: Tensor) -> contextlib.AbstractContextManager[None]:
    # Only where there is one to leave: in an exported program it makes a graph of its own.
    device = unary.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


# ---- arguments ----


def _check_unary(unary: Tensor) -> None:
    if unary.dim() not in (3, 4, 5):
        raise RuntimeError(f"dense_crf: unary must be [N, C, *S] with S of 1 to 3 axes, got {list(unary.shape)}")
    if not unary.is_floating_point():
        raise RuntimeError(f"dense_crf: unary must be of floating point, got {unary.dtype}")
    if unary.shape[1] < 2:
        raise RuntimeError(f"dense_crf: unary must have at least two classes, got {list(unary.shape)}")
    if any(size == 0 for size in unary.shape[2:]):
        raise RuntimeError(f"dense_crf: unary must have pixels, got {list(unary.shape)}")


def _check_run(
    unary: Tensor, iterations: int, temperature: float, initial: Tensor | None, tolerance: float | None
) -> None:
    _check_unary(unary)
    if iterations < 0:
        raise RuntimeError(f"dense_crf: iterations must not be negative, got {iterations}")
    if not 1e-30 <= temperature <= 1e30:
        raise RuntimeError(f"dense_crf: temperature must be from 1e-30 to 1e30, got {temperature}")
    if tolerance is not None and not tolerance >= 0:
        raise RuntimeError(f"dense_crf: tolerance must not be negative, got {tolerance}")
    if initial is not None and initial.shape != unary.shape:
        raise RuntimeError(f"dense_crf: initial must be {list(unary.shape)} like unary, got {list(initial.shape)}")


def _check_image(unary: Tensor, image: Tensor) -> None:
    fits = image.dim() == unary.dim() and image.shape[0] == unary.shape[0] and image.shape[2:] == unary.shape[2:]
    if not fits:
        expected = ", ".join(map(str, [unary.shape[0], "K", *unary.shape[2:]]))
        raise RuntimeError(
            f"dense_crf: image must be [{expected}] for unary {list(unary.shape)}, got {list(image.shape)}"
        )
    if image.is_complex():
        raise RuntimeError(f"dense_crf: image must be of real numbers, got {image.dtype}")
    if image.device != unary.device:
        raise RuntimeError(f"dense_crf: image must be on {unary.device} like unary, got {image.device}")


def _tensor(name: str, value: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    raise RuntimeError(f"dense_crf: {name} must be a tensor like unary, got {type(value).__name__}")


def _list(name: str, value: Tensor | Sequence[Tensor] | None, count: int) -> Sequence[Tensor | None]:
    if value is None:
        return [None] * count
    if isinstance(value, Tensor) or len(value) != count:
        got = "a tensor" if isinstance(value, Tensor) else len(value)
        raise RuntimeError(f"dense_crf: {name} must be a list of {count} like unary, got {got}")
    return value
