"""The functions of `pydensecrf.utils`: energies from labels or probabilities, and features of pairwise kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def unary_from_labels(labels: Any, n_labels: int, gt_prob: float, zero_unsure: bool = True) -> Array:
    """Energies [n_labels, nvar] of a label map that is right with probability `gt_prob`.

    The other labels share the rest. zero_unsure: 0 means unknown (all labels alike), and labels count from 1; without
    it 0 is a label like the others.
    """
    if not 0 < gt_prob < 1:
        raise AssertionError("`gt_prob must be in (0,1).")
    flat = np.asarray(labels).reshape(-1)
    probability = np.full((n_labels, flat.size), (1 - gt_prob) / (n_labels - 1))
    known = flat != 0 if zero_unsure else np.ones(flat.shape, bool)
    where = np.flatnonzero(known)
    probability[flat[where].astype(np.int64) - int(zero_unsure), where] = gt_prob
    probability[:, ~known] = 1 / n_labels
    return (-np.log(probability)).astype(np.float32)


def unary_from_softmax(sm: Any, scale: float | None = None, clip: float | None = 1e-5) -> Array:
    """Energies [n_labels, nvar] of probabilities [n_labels, ...].

    scale: how far to trust them, mixes them with uniform ones; clip: the least probability.
    """
    probability = np.asarray(sm)
    if scale is not None:
        if not 0 < scale <= 1:
            raise AssertionError("`scale` needs to be in (0,1]")
        probability = scale * probability + (1 - scale) / probability.shape[0]
    if clip is not None:
        probability = np.clip(probability, clip, 1)
    return np.ascontiguousarray(-np.log(probability).reshape(probability.shape[0], -1), np.float32)


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> Array:
    """Features [axes, nvar] for `addPairwiseEnergy`: positions in a map of this shape, divided by `sdims`."""
    return _positions(sdims, shape).reshape(len(shape), -1)


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: float | Sequence[float], img: Any, chdim: int = -1
) -> Array:
    """Features [axes + channels, nvar]: positions divided by `sdims`, then channels divided by `schan`.

    chdim: the axis of `img` that holds channels; -1: it has none.
    """
    image = np.asarray(img, np.float32)
    channels = image[None] if chdim == -1 else np.moveaxis(image, chdim, 0)
    scale = np.asarray(schan, np.float32).reshape(-1, *[1] * (channels.ndim - 1))
    return np.concatenate([_positions(sdims, channels.shape[1:]), channels / scale]).reshape(
        len(sdims) + len(channels), -1
    )


def compute_unary(labels: Any, M: int, GT_PROB: float = 0.5) -> Array:
    """`unary_from_labels` under its old name."""
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: Any, GT_PROB: float = 1) -> Array:
    """`unary_from_softmax` under its old name."""
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def _positions(sdims: Sequence[float], shape: Sequence[int]) -> Array:
    if len(sdims) != len(shape):
        raise ValueError(f"sdims must have an element for each of the {len(shape)} axes, got {list(sdims)}")
    grid = np.indices(tuple(shape), np.float32)
    return grid / np.asarray(sdims, np.float32).reshape(-1, *[1] * len(shape))
