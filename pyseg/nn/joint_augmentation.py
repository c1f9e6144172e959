"""Random warps and grey values for images and their labels, as a module."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyseg import functional as F
from pyseg.functional.joint_warp import Border, random_displacement


class WarpParameters(NamedTuple):
    """What `JointAugmentation` drew for a batch: arguments of `pyseg.functional.joint_warp`, on the CPU."""

    affine: Tensor  # [N, d, d + 1], float64
    displacement: Tensor | None  # [N, d, *grid]
    gain: Tensor  # [N], float64
    bias: Tensor  # [N], float64


class JointAugmentation(nn.Module):
    r"""U-Net's augmentation (Ronneberger et al. 2015, 1505.04597, section 3.1) of a batch and its labels in one pass.

        augment = JointAugmentation(size=(256, 256), generator=torch.Generator().manual_seed(0))
        images, masks = augment(images, masks)

    Each image gets its own elastic deformation, flips, rotation, scale, crop, contrast and brightness:

        output = (value - grey) * contrast + grey + brightness,   grey = the middle of the range

    where the range is 255 for uint8 images and 1 for others. The parameters are drawn on the CPU in one order, so that
    a seed gives the same batch on each device; `draw` returns them, for other tensors of the same scene or to be kept.

    Args:
        size: of the output, one integer or one for each axis; the image's if left out.
        sigma, grid: of the displacement, as in `pyseg.functional.elastic_deform`; sigma 0: none.
        flip: probability of mirroring each axis, a number or one for each axis.
        rotation: largest angle in degrees; of volumes, a number about D or three about D, H, W.
        scale: factors of size, between which one is drawn on a logarithmic axis.
        translation: largest shift along each axis, as a share of the image's side.
        crop: of an output smaller than the image: "random", anywhere inside, or "center".
        brightness: largest change, as a share of the range.
        contrast: largest change of the factor 1.
        border, fill, label_border, ignore_index, dtype: as in `pyseg.functional.joint_warp`.
        generator: of the CPU; torch's if left out.

    Takes images [N, C, *S] and labels as in `joint_warp`, or None, and returns both. Active in eval mode too: leave it
    out where nothing is to be changed. The warp is differentiable in images and soft labels.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        *,
        sigma: float | Sequence[float] = 10.0,
        grid: int | Sequence[int] = 3,
        flip: float | Sequence[float] = 0.5,
        rotation: float | Sequence[float] = 15.0,
        scale: tuple[float, float] = (0.9, 1.1),
        translation: float = 0.0,
        crop: Literal["random", "center"] = "random",
        brightness: float = 0.1,
        contrast: float = 0.1,
        border: Border = "reflect",
        fill: float = 0.0,
        label_border: Border | None = None,
        ignore_index: int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not 0 < scale[0] <= scale[1] < math.inf:
            raise RuntimeError(f"JointAugmentation: scale must be two positive numbers that increase, got {scale}")
        if crop not in ("random", "center"):
            raise RuntimeError(f"JointAugmentation: crop must be random or center, got {crop}")
        for name, value in (("brightness", brightness), ("contrast", contrast), ("translation", translation)):
            if not 0 <= value < math.inf:
                raise RuntimeError(f"JointAugmentation: {name} must not be negative, got {value}")
        if generator is not None and generator.device.type != "cpu":
            raise RuntimeError(f"JointAugmentation: generator must be on the CPU, got {generator.device}")
        self.size = size
        self.sigma = sigma
        self.grid = grid
        self.flip = flip
        self.rotation = rotation
        self.scale = scale
        self.translation = translation
        self.crop = crop
        self.brightness = brightness
        self.contrast = contrast
        self.border: Border = border
        self.fill = fill
        self.label_border: Border | None = label_border
        self.ignore_index = ignore_index
        self.dtype = dtype
        self.generator = generator

    def output_size(self, image_size: Sequence[int]) -> list[int]:
        """Sides of the output of images of these."""
        if self.size is None:
            return list(image_size)
        return [self.size] * len(image_size) if isinstance(self.size, int) else list(self.size)

    def draw(self, images: int, image_size: Sequence[int], range: float = 1.0) -> WarpParameters:
        """The parameters of a batch; `range` of the image's values: 255 for uint8."""
        axes, size = len(image_size), self.output_size(image_size)
        turns = list(self.rotation) if isinstance(self.rotation, Sequence) else [self.rotation]
        flips = list(self.flip) if isinstance(self.flip, Sequence) else [self.flip] * axes
        if len(flips) != axes or len(size) != axes or len(turns) not in ((1,) if axes == 2 else (1, 3)):
            raise RuntimeError(
                f"JointAugmentation: size, flip and rotation must fit images of {axes} axes, got {self.size}, "
                f"{self.flip} and {self.rotation}"
            )
        # All of a batch's numbers but the displacement at once, in an order that no argument changes.
        uniform = torch.rand(images, 3 + 1 + 3 * axes + 2, generator=self.generator, dtype=torch.float64)
        signed = 2 * uniform - 1
        rotation = signed[:, : len(turns)] * torch.tensor(turns, dtype=torch.float64)
        low, high = (math.log(factor) for factor in self.scale)
        scale = (low + (high - low) * uniform[:, 3]).exp()
        flip = uniform[:, 4 : 4 + axes] < torch.tensor(flips, dtype=torch.float64)
        sides = torch.tensor([float(side) for side in image_size], dtype=torch.float64)
        translation = signed[:, 4 + axes : 4 + 2 * axes] * self.translation * sides
        if self.crop == "random":
            free = (sides - torch.tensor([float(side) for side in size], dtype=torch.float64)).clamp_min(0)
            # Whole elements, so that a crop alone copies.
            first = (uniform[:, 4 + 2 * axes : 4 + 3 * axes] * (free + 1)).floor().minimum(free)
            translation = translation + first - free / 2
        contrast = 1 + signed[:, -2] * self.contrast
        bias = range * (0.5 * (1 - contrast) + signed[:, -1] * self.brightness)
        affine = F.warp_matrix(image_size, size, rotation=rotation, scale=scale, flip=flip, translation=translation)
        still = not any(self.sigma) if isinstance(self.sigma, Sequence) else self.sigma == 0
        displacement = None if still else random_displacement(images, axes, self.sigma, self.grid, self.generator)
        return WarpParameters(affine, displacement, contrast, bias)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if images.dim() not in (4, 5):
            shape = list(images.shape)
            raise RuntimeError(f"JointAugmentation: images must be [N, C, H, W] or [N, C, D, H, W], got {shape}")
        image_size = list(images.shape[2:])
        drawn = self.draw(images.shape[0], image_size, 255.0 if images.dtype == torch.uint8 else 1.0)
        return F.joint_warp(
            images,
            labels,
            drawn.affine,
            drawn.displacement,
            gain=drawn.gain,
            bias=drawn.bias,
            size=self.output_size(image_size),
            border=self.border,
            fill=self.fill,
            label_border=self.label_border,
            ignore_index=self.ignore_index,
            dtype=self.dtype,
        )

    def extra_repr(self) -> str:
        shown = (
            "size",
            "sigma",
            "grid",
            "flip",
            "rotation",
            "scale",
            "translation",
            "brightness",
            "contrast",
            "border",
        )
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)
