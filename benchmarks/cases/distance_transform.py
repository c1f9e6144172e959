"""distance_transform: exact Euclidean distances of masks beside the exact peers scipy, edt and OpenCV.

Blobs are thresholded smooth noise, as masks of objects are; noise is what an untrained network predicts; one zero, a
disc and stripes are the shapes on which algorithms for distance maps differ most.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from harness import Case, Contender, Prepared, Workload

BASELINE = "scipy"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row


@dataclass(frozen=True)
class Map:
    kind: str
    shape: tuple[int, ...]  # of all maps together
    dims: int = 2
    family: str = "distance transform, blobs"
    labels: bool = False
    quick: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        what = "labels" if self.labels else "mask"
        return f"distance_transform/{what}/{self.kind}/{'x'.join(map(str, self.shape))}"

    def make(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        axes = self.shape[-self.dims :]
        maps = [_KINDS[self.kind](axes, rng) for _ in range(int(np.prod(self.shape[: -self.dims], dtype=int)))]
        return np.stack(maps).reshape(self.shape)


def _blobs(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(rng.standard_normal(shape), 8 if len(shape) == 2 else 5) > 0


def _one_zero(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    mask = np.ones(shape, bool)
    mask[tuple(n // 3 for n in shape)] = False
    return mask


def _disc(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij"))
    return (grid**2).sum(0) < (min(shape) / 2 - 2) ** 2


def _stripes(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    mask = np.ones(shape, bool)
    mask[..., ::32] = False
    return mask


_KINDS: dict[str, Callable[[tuple[int, ...], np.random.Generator], np.ndarray]] = {
    "blobs": _blobs,
    "noise": lambda shape, rng: rng.random(shape) < 0.5,
    "one zero": _one_zero,
    "disc": _disc,
    "stripes": _stripes,
}


def cases() -> list[Case]:
    worst = "distance transform, other shapes"
    maps = [
        Map("blobs", (512, 512), quick=(1, 2)),
        Map("blobs", (2048, 2048), quick=(1, 2)),
        Map("blobs", (128, 128, 128), 3, quick=(1, 2)),
        Map("blobs", (64, 128, 128), family="distance transform, batch of 64", quick=(1, 2)),
        *[
            Map(kind, (n, n), family=worst, quick=(1,) if n == 512 else ())
            for kind in ("noise", "one zero", "disc", "stripes")
            for n in (512, 2048)
        ],
        Map("one zero", (128, 128, 128), 3, family=worst),
        Map("noise", (128, 128, 128), 3, family=worst),
        Map("blobs", (512, 512), family="distance transform, labels", labels=True, quick=(1,)),
        Map("noise", (512, 512), family="distance transform, labels", labels=True),
        Map("one zero", (512, 512), family="distance transform, labels", labels=True),
    ]
    return [_case(one) for one in maps]


def _case(one: Map) -> Case:
    def build() -> Workload:
        mask = one.make()
        maps = mask.reshape(-1, *one.shape[-one.dims :])

        def each(transform: Callable[[np.ndarray], np.ndarray]) -> Prepared:
            if len(maps) == 1:
                return Prepared(lambda: torch.from_numpy(transform(maps[0])).reshape(one.shape))
            return Prepared(lambda: torch.from_numpy(np.stack([transform(m) for m in maps])).reshape(one.shape))

        return Workload(
            [
                Contender(BASELINE, lambda: each(_scipy_of_both_values if one.labels else _scipy)),
                Contender("edt", lambda: each(_edt(one.labels))),
                *([] if one.dims == 3 else [Contender("OpenCV", lambda: each(_opencv(one.labels)))]),
                Contender("pyseg", lambda: _pyseg(one, mask), ours=True),
            ],
            lambda: [
                torch.from_numpy(
                    np.stack([(_scipy_of_both_values if one.labels else _scipy)(m) for m in maps])
                ).reshape(one.shape)
            ],
        )

    elements = int(np.prod(one.shape))
    return Case(
        name=one.name,
        groups=(one.family,),
        build=build,
        params={"input": list(one.shape), "axes": one.dims, "kind": one.kind, "labels": one.labels},
        baseline=BASELINE,
        tolerance=1e-6,
        least=lambda: (0, elements * (1 + 4)),
        quick=one.quick,
    )


def _scipy(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(mask)


def _scipy_of_both_values(mask: np.ndarray) -> np.ndarray:
    return _scipy(mask) + _scipy(~mask)


def _edt(labels: bool) -> Callable[[np.ndarray], np.ndarray]:
    import edt

    threads = torch.get_num_threads()
    if labels:  # its 0 is background: numbers from 1 on
        return lambda mask: edt.edt(mask.view(np.uint8) + np.uint8(1), parallel=threads)
    return lambda mask: edt.edt(mask, parallel=threads)


def _opencv(labels: bool) -> Callable[[np.ndarray], np.ndarray]:
    import cv2

    cv2.setNumThreads(torch.get_num_threads())

    def transform(mask: np.ndarray) -> np.ndarray:
        return cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    return (lambda mask: transform(mask) + transform(~mask)) if labels else transform


def _pyseg(one: Map, mask: np.ndarray) -> Prepared:
    from pyseg.functional import distance_transform

    input = torch.from_numpy(mask)
    return Prepared(lambda: distance_transform(input, dims=one.dims, labels=one.labels))
