"""RoIAlign over a feature pyramid as a module."""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from pyseg import functional as F


class MultiScaleRoIAlign(nn.Module):
    r"""torchvision.ops.MultiScaleRoIAlign with its constructor and results, in one call of one kernel.

        pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
        pooled = pooler(features, [boxes_of_image_0, boxes_of_image_1], [(800, 1216), (768, 1024)])

    Each box is pooled from the level floor(canonical_level + log2(sqrt(area) / canonical_scale)) (Lin et al. 2017,
    equation 1), within the levels that there are; the scale of a map is the power of two next to its height over that
    of the largest image.

    Args:
        featmap_names: the keys of the feature maps to use, finest first.
        output_size, sampling_ratio, aligned, mode: as in `pyseg.functional.roi_align`.
        canonical_scale, canonical_level: boxes of this size belong to this level.

    Takes a dict of maps [N, C, H_l, W_l], a list with boxes [L, 4] (x1, y1, x2, y2, in pixels of the image) for each
    image, and a list with the height and width of each image. Returns [K, C, *output_size] in the order of the boxes,
    channels_last where a map is. Scales are found anew in each call. Gradients, determinism and complexity are
    those of `pyseg.functional.multiscale_roi_align`.

    Raises:
        ValueError: no images. RuntimeError: where `pyseg.functional.roi_align` does.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int, ...] | list[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        mode: Literal["avg", "max"] = "avg",
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.aligned = aligned
        self.mode = mode

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [feature for name, feature in x.items() if name in self.featmap_names]
        return pooled(
            maps,
            boxes,
            image_shapes,
            self.output_size,
            self.sampling_ratio,
            self.canonical_scale,
            self.canonical_level,
            self.aligned,
            self.mode,
        )

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )


def pooled(
    maps: list[Tensor],
    boxes: list[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    output_size: Sequence[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: float,
    aligned: bool = False,
    mode: Literal["avg", "max"] = "avg",
) -> Tensor:
    """What MultiScaleRoIAlign computes."""
    if not image_shapes:
        raise ValueError("MultiScaleRoIAlign: image_shapes must not be empty")
    height = max(shape[0] for shape in image_shapes)
    scales = [2.0 ** round(math.log2(feature.shape[-2] / height)) for feature in maps]
    if len(maps) == 1:
        return F.roi_align(maps[0], boxes, output_size, scales[0], sampling_ratio, aligned, mode=mode)
    return F.multiscale_roi_align(
        maps,
        boxes,
        output_size,
        scales,
        sampling_ratio,
        aligned,
        mode=mode,
        canonical_size=canonical_scale,
        canonical_level=canonical_level,
    )
