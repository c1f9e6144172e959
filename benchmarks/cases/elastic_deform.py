"""U-Net's augmentation beside what users put together for it: eight images and their masks, all warped differently.

Displacements on a 3x3 grid of 10 pixels' deviation, interpolated bicubically, a rotation, scale and flips, contrast and
brightness; images linear, masks to the nearest, mirrored at the border. Plain PyTorch does exactly this (cubic=-3/4 is
its bicubic interpolation), so results are compared. kornia, torchvision and albumentations draw other fields (noise
smoothed by a Gaussian) and have no joint pass: they do their own equal work, an elastic and an affine warp of images
and masks, contrast and brightness; their results are not compared (their difference reads 0 by construction). The floor
is images and masks read once and written once.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row
TOLERANCE = 2e-3  # torch's places are fractions of the image's side in float32
IMAGES, SIDE = 8, 512


def cases() -> list[Case]:
    return [_case("float32", 1), _case("float32", 8), _case("uint8", 8)]


def _case(dtype: str, images: int) -> Case:
    def build() -> Workload:
        from pyseg import functional

        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(images, 3, 33, 33, generator=generator)
        image = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True).clamp(0, 1)
        if dtype == "uint8":
            image = (image * 255).round().to(torch.uint8)
        labels = (coarse[:, :1].repeat_interleave(16, -1).repeat_interleave(16, -2)[:, 0, :SIDE, :SIDE] * 9).long()
        turns = torch.rand(images, generator=generator) * 30 - 15
        scale = torch.rand(images, generator=generator) * 0.2 + 0.9
        flip = torch.rand(images, 2, generator=generator) < 0.5
        affine = functional.warp_matrix((SIDE, SIDE), rotation=turns, scale=scale, flip=flip)
        displacement = torch.randn(images, 2, 3, 3, generator=generator) * 10
        full = 255.0 if dtype == "uint8" else 1.0
        gain = torch.rand(images, generator=generator) * 0.2 + 0.9
        bias = (torch.rand(images, generator=generator) * 0.2 - 0.1) * full

        def ours(to: torch.dtype) -> tuple[Tensor, ...]:
            return functional.joint_warp(
                image, labels, affine, displacement, gain=gain, bias=bias, cubic=-0.75, dtype=to
            )  # type: ignore[return-value]

        def torch_warp(x: Tensor, labels: Tensor, affine: Tensor, displacement: Tensor) -> list[Tensor]:
            """Bicubic field, affine grid, two samplings."""
            field = F.interpolate(displacement, (SIDE, SIDE), mode="bicubic", align_corners=True)
            last = SIDE - 1
            theta = affine.flip(1)[:, :, [1, 0, 2]].float()  # x before y
            theta[:, :, 2] = 2 * theta[:, :, 2] / last - 1 + theta[:, :, 0] + theta[:, :, 1]
            grid = F.affine_grid(theta, (len(x), 1, SIDE, SIDE), align_corners=True)
            grid = grid + field.flip(1).movedim(1, -1) * (2 / last)
            options = {"padding_mode": "reflection", "align_corners": True}
            y = F.grid_sample(x.float(), grid, mode="bilinear", **options)
            mask = F.grid_sample(labels[:, None].float(), grid, mode="nearest", **options)[:, 0].long()
            y = y * gain[:, None, None, None] + bias[:, None, None, None]
            return [y.clamp(0, 255).round().to(torch.uint8) if x.dtype == torch.uint8 else y, mask]

        def compared(result: Any) -> list[Tensor]:
            """The image; labels as the share that differs, since places are as near to two elements now and then."""
            y, mask = result
            return [y.float(), (mask != reference[1]).float().mean().reshape(1)]

        reference = [t.clone() for t in ours(image.dtype)]
        arguments = (image, labels, affine, displacement)

        @functools.cache  # before anything is timed
        def expected() -> list[Tensor]:
            from pyseg import reference as oracle

            y, mask = oracle.joint_warp(image, labels, affine, displacement, *_factors(gain, bias), cubic=-0.75)
            if dtype == "uint8":
                y = y.clamp(0, 255)
            assert (mask != reference[1]).float().mean() < 1e-3
            return [y, torch.ones(1, dtype=torch.float64)]

        def checked(call: Callable[[], Any], first: Callable[[], list[Tensor]]) -> Prepared:
            """The first call is compared, in the form of `expected`; those after it are timed alone."""
            done = False

            def run() -> Any:
                nonlocal done
                if done:
                    return call()
                done = True
                return first()

            return Prepared(run)

        def same(call: Callable[[], Any]) -> Prepared:
            def first() -> list[Tensor]:
                y, share = compared(call())
                return [y, torch.ones(1) + share]

            return checked(call, first)

        def other(make: Callable[..., Callable[[], Any]]) -> Prepared:
            """A peer whose warps are others: its result cannot be compared."""
            call = make(image, labels)
            return checked(call, lambda: (call(), list(expected()))[1])

        compiled = torch.compile(torch_warp, dynamic=False)
        contenders = [
            Contender(BASELINE, lambda: same(lambda: torch_warp(*arguments))),
            Contender("torch.compile", lambda: (compiled(*arguments), same(lambda: compiled(*arguments)))[1]),
            Contender("kornia (own field)", lambda: other(_kornia)),
            Contender("torchvision v2 (own field)", lambda: other(_torchvision)),
            Contender("albumentations (own field)", lambda: other(_albumentations)),
            Contender("pyseg", lambda: same(lambda: ours(image.dtype)), ours=True),
        ]
        return Workload(contenders, expected)

    size = 1 if dtype == "uint8" else 4
    return Case(
        name=f"systems/elastic_deform/{images}x3x{SIDE}x{SIDE} {dtype} and masks",
        groups=("U-Net augmentation, image and mask",),
        build=build,
        params={"images": [images, 3, SIDE, SIDE], "dtype": dtype, "labels": "int64"},
        baseline=BASELINE,
        tolerance=TOLERANCE if dtype == "float32" else 4e-3,  # half a step of 255 in either direction
        least=lambda: (0, 2 * images * SIDE * SIDE * (3 * size + 8)),
        quick=(1,) if images == 1 else (),
    )


def _factors(gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return gain[:, None].expand(-1, 3), bias[:, None].expand(-1, 3)


def _kornia(image: Tensor, labels: Tensor) -> Callable[[], Any]:
    from kornia import augmentation as K

    x = image.float() / 255 if image.dtype == torch.uint8 else image
    mask = labels[:, None].float()
    pipeline = K.AugmentationSequential(
        K.RandomElasticTransform(kernel_size=(63, 63), sigma=(32.0, 32.0), alpha=(1.0, 1.0), p=1.0),
        K.RandomAffine(15.0, scale=(0.9, 1.1), padding_mode="reflection", p=1.0),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.5),
        K.ColorJiggle(brightness=0.1, contrast=0.1, p=1.0),
        data_keys=["input", "mask"],
        extra_args={},
    )
    return lambda: pipeline(x, mask)


def _torchvision(image: Tensor, labels: Tensor) -> Callable[[], Any]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    pipeline = v2.Compose(
        [
            v2.ElasticTransform(alpha=50.0, sigma=5.0),
            v2.RandomAffine(15, scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.5),
            v2.ColorJitter(brightness=0.1, contrast=0.1),
        ]
    )
    # Their parameters are drawn once a call: an image at a time, so that each has its own.
    pairs = [(tv_tensors.Image(x), tv_tensors.Mask(m)) for x, m in zip(image, labels, strict=True)]
    return lambda: [pipeline(*pair) for pair in pairs]


def _albumentations(image: Tensor, labels: Tensor) -> Callable[[], Any]:
    import albumentations as A
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    pipeline = A.Compose(
        [
            A.ElasticTransform(alpha=50, sigma=5, border_mode=cv2.BORDER_REFLECT_101, p=1.0),
            A.Affine(rotate=(-15, 15), scale=(0.9, 1.1), border_mode=cv2.BORDER_REFLECT_101, p=1.0),
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.RandomBrightnessContrast(0.1, 0.1, p=1.0),
        ]
    )
    pairs = [(x.movedim(0, -1).contiguous().numpy(), m.int().numpy()) for x, m in zip(image, labels, strict=True)]
    return lambda: [pipeline(image=x, mask=m) for x, m in pairs]
