"""The classes and constants of `pydensecrf.densecrf`.

Conventions are pydensecrf's: a compatibility that is a number is a Potts weight, a vector or a matrix are costs (a
matrix is made symmetric); normalisation is symmetric by default; NO_NORMALIZATION multiplies by nothing; pixels of
`DenseCRF2D` are in the order of image rows. Arrays of any real type, strides and, beyond their first axis, shape are
taken, where pydensecrf insists on contiguous float32 and uint8; results are NumPy arrays. `addPairwiseGaussian` is a
separable filter instead of a lattice, so marginals are a little nearer to those of the exact kernels than pydensecrf's,
and with NO_NORMALIZATION its sums are 13% larger. Two labels or more; features have at most 8 dimensions, any number
with accuracy="exact". Kernel types only matter to learning, which pydensecrf does not offer in Python: all give the
same result.
"""

from collections.abc import Sequence
from enum import IntEnum
from numbers import Number
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyseg.functional.dense_crf import dense_crf, finite_where
from pyseg.functional.pairwise_kernels import Bound, CrfAccuracy, FeatureKernel, GaussianKernel, Normalization

Array = npt.NDArray[np.float32]


class KernelType(IntEnum):
    """How a kernel's scales are parametrised for learning."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """How a kernel is normalised."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType

_NORMALIZATION: dict[int, Normalization] = {
    NO_NORMALIZATION: "none",
    NORMALIZE_BEFORE: "before",
    NORMALIZE_AFTER: "after",
    NORMALIZE_SYMMETRIC: "symmetric",
}


class DenseCRF:
    """A fully connected CRF of `nvar` variables with `nlabels` labels each.

    `accuracy` is pyseg's: "fast", "high" or "exact", see `pyseg.functional.dense_crf`.
    """

    def __init__(self, nvar: int, nlabels: int, *, accuracy: CrfAccuracy = "fast"):
        self._set_up((int(nvar),), nlabels, accuracy)

    def _set_up(self, shape: tuple[int, ...], nlabels: int, accuracy: CrfAccuracy) -> None:
        self._shape = shape
        self._nvar = int(np.prod(shape))
        self._nlabels = int(nlabels)
        self._accuracy: CrfAccuracy = accuracy
        self._unary = torch.zeros(1, self._nlabels, *shape)
        self._kernels: list[Bound] = []

    def setUnaryEnergy(self, u: Any, f: Any = None) -> None:
        """U [nlabels, nvar]: -log of probabilities; with `f` the energies are the product u @ f (logistic)."""
        energy = _array(u) if f is None else _array(u) @ _array(f)
        if energy.shape[:1] != (self._nlabels,) or energy.size != self._nlabels * self._nvar:
            raise ValueError(f"Bad shape for unary energy (Need {(self._nlabels, self._nvar)}, got {energy.shape})")
        self._unary = torch.from_numpy(energy.copy()).reshape(1, self._nlabels, *self._shape)

    def setUnary(self, u: "ConstUnary | LogisticUnary") -> None:
        """A `ConstUnary` or `LogisticUnary`."""
        self.setUnaryEnergy(u.energy)

    def addPairwiseEnergy(
        self,
        features: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """exp(-|f_i - f_j|^2 / 2) of features [d, nvar], of `utils.create_pairwise_gaussian` or `_bilateral`."""
        array = _array(features)
        if array.ndim < 2 or array.size != array.shape[0] * self._nvar:
            raise ValueError(f"Bad shape for pairwise energy (Need (?, {self._nvar}), got {array.shape})")
        points = torch.from_numpy(array.copy()).reshape(1, -1, *self._shape)
        self._add(FeatureKernel(points, self._costs(compat)), kernel, normalization)

    def inference(self, niter: int) -> Array:
        """Marginals [nlabels, nvar] after `niter` iterations."""
        return self._run(int(niter), None)

    def startInference(self) -> tuple[Array, Array, Array]:
        """Marginals to start from, and two arrays that `stepInference` takes, as pydensecrf's does."""
        return self._run(0, None), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)

    def stepInference(self, Q: Array, tmp1: Any = None, tmp2: Any = None) -> None:
        """One iteration, which changes Q in place."""
        Q[...] = self._run(1, Q).reshape(Q.shape)

    def klDivergence(self, Q: Any) -> float:
        """pydensecrf's value: sum of Q log Q + Q U + Q E, each pair of pixels counted twice.

        `pyseg.functional.dense_crf_energy` counts each once, as the definition of the divergence does.
        """
        q = self._marginals(Q).double()
        unary = self._unary.double()
        total = torch.special.xlogy(q, q.clamp_min(1e-20)) + q * finite_where(q, unary)
        for kernel in self._kernels:
            total = total + q * kernel.energy(q).double()
        return float(total.sum())

    def map(self, niter: int) -> npt.NDArray[np.int64]:
        """The most probable labels [nvar] after `niter` iterations."""
        return self.inference(niter).argmax(0)

    def _run(self, iterations: int, initial: Any) -> Array:
        with torch.no_grad():
            marginals = dense_crf(
                self._unary,
                kernels=self._kernels,
                smoothness=None,
                iterations=iterations,
                accuracy=self._accuracy,
                initial=None if initial is None else self._marginals(initial),
            )
        return marginals.reshape(self._nlabels, self._nvar).numpy()

    def _marginals(self, Q: Any) -> Tensor:
        return torch.from_numpy(_array(Q).copy()).reshape(self._unary.shape)

    def _add(self, kernel: FeatureKernel | GaussianKernel, kernel_type: int, normalization: int) -> None:
        KernelType(kernel_type)
        name = _NORMALIZATION[NormalizationType(normalization)]
        self._kernels.append(kernel.bind(self._unary, name, self._accuracy))

    def _costs(self, compat: Any) -> Tensor:
        """As pyseg's compatibility: weights for a number or a vector, costs for a matrix."""
        if isinstance(compat, Number):
            return torch.tensor(float(compat))  # type: ignore[arg-type]
        costs = torch.from_numpy(_array(compat).copy())
        if costs.dim() == 0:
            return costs
        if costs.dim() > 2:
            raise ValueError("LabelCompatibility of dimension >2 not meaningful.")
        if any(size != self._nlabels for size in costs.shape):
            expected = (self._nlabels,) * costs.dim()
            raise ValueError(f"Bad shape for compatibility (Need {expected}, got {tuple(costs.shape)})")
        return -costs if costs.dim() == 1 else (costs + costs.T) / 2


class DenseCRF2D(DenseCRF):
    """A fully connected CRF over the pixels of an image of w columns and h rows."""

    def __init__(self, w: int, h: int, nlabels: int, *, accuracy: CrfAccuracy = "fast"):
        self._set_up((int(h), int(w)), nlabels, accuracy)

    def addPairwiseGaussian(
        self,
        sxy: float | Sequence[float],
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """exp(-|p_i - p_j|^2 / (2 sxy^2)) of positions; sxy a number or (sx, sy)."""
        sx, sy = _numbers(sxy, 2)
        self._add(GaussianKernel((sy, sx), self._costs(compat)), kernel, normalization)

    def addPairwiseBilateral(
        self,
        sxy: float | Sequence[float],
        srgb: float | Sequence[float],
        rgbim: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """exp(-|p_i - p_j|^2 / (2 sxy^2) - |I_i - I_j|^2 / (2 srgb^2)) for an image [h, w, 3]."""
        image = _array(rgbim)
        h, w = self._shape
        if image.shape[:2] != (h, w) or image.ndim != 3:
            raise ValueError(f"Bad shape for pairwise bilateral (Need {(h, w, 3)}, got {image.shape})")
        if image.shape[2] != 3:
            raise ValueError(
                "addPairwiseBilateral only works for RGB images. For other types, use "
                "`utils.create_pairwise_bilateral` to make the features of `addPairwiseEnergy`."
            )
        sx, sy = _numbers(sxy, 2)
        x, y = np.arange(w, dtype=np.float32) / np.float32(sx), np.arange(h, dtype=np.float32) / np.float32(sy)
        color = image / np.asarray(_numbers(srgb, 3), np.float32)
        position = np.stack(np.broadcast_arrays(x[None, :], y[:, None]))
        self.addPairwiseEnergy(np.concatenate([position, color.transpose(2, 0, 1)]), compat, kernel, normalization)


class ConstUnary:
    """Energies [nlabels, nvar] for `setUnary`."""

    def __init__(self, u: Any):
        self.energy = _array(u)


class LogisticUnary:
    """Energies L @ f for `setUnary`: weights L [nlabels, k] and features f [k, nvar]."""

    def __init__(self, L: Any, f: Any):
        self.energy = _array(L) @ _array(f)


def _array(value: Any) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, np.float32)


def _numbers(value: Any, count: int) -> list[float]:
    numbers = [float(value)] * count if isinstance(value, Number) else [float(v) for v in value]  # type: ignore[arg-type]
    if len(numbers) != count or not all(number > 0 for number in numbers):
        raise ValueError(f"standard deviations must be one or {count} positive numbers, got {value}")
    return numbers
