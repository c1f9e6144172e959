"""Derivatives in forward mode, which torch drops silently at an operator: those that have none say so."""

import pytest
import torch

from pyseg import functional as F

MAP = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
FEATURES, LABELS, EYE = MAP[:, :2], (MAP[:, 0] > 0.5).long(), torch.eye(3)[None]
BOXES = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
LINKS = F.pixel_links(torch.tensor([0, 1, 2]), torch.tensor([1, 0]))
CALLS = {
    "bilinear_upsample": lambda x: F.bilinear_upsample(x, 8),
    "upsample_concat": lambda x: F.upsample_concat([MAP, x], 8),
    "upsample_concat_depthwise": lambda x: F.upsample_concat_depthwise([x], torch.ones(1, 3, 3, 3), dilations=(1,)),
    "roi_align": lambda x: F.roi_align(x, BOXES, 2),
    "multiscale_roi_align": lambda x: F.multiscale_roi_align([x], BOXES, 2, [1.0]),
    "paste_masks": lambda x: F.paste_masks(x[0], BOXES[:, 1:].expand(3, -1), (5, 5), threshold=None),
    "warp_to_view": lambda x: F.warp_to_view(x, LABELS + 1.0, EYE, EYE, torch.eye(4)[None])[0],
    "warp_and_fuse": lambda x: F.warp_and_fuse(x, LABELS + 1.0, EYE, EYE, torch.eye(4)[None]),
    "joint_warp": lambda x: F.joint_warp(x)[0],
    "sparse_pairwise": lambda x: F.sparse_pairwise(x[0, 0, :2], LINKS),
    "gaussian_filter": lambda x: F.gaussian_filter(x, 1.0),
    "permutohedral_lattice": lambda x: F.permutohedral_lattice(x).weight,
    "permutohedral_filter": lambda x: F.permutohedral_filter(F.permutohedral_lattice(FEATURES), x),
    "dense_crf": lambda x: F.dense_crf(x, iterations=1),
    "dense_crf of the image": lambda x: F.dense_crf(MAP, x, iterations=1),
    "dice_loss": lambda x: F.dice_loss(x, LABELS),
    "cross_entropy": lambda x: F.cross_entropy(x, LABELS),
    "lovasz_softmax_loss": lambda x: F.lovasz_softmax_loss(x, LABELS),
    "boundary_loss": lambda x: F.boundary_loss(x, LABELS),
    "point_supervision_loss": lambda x: F.point_supervision_loss(x, LABELS),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused(name):
    message = f"{name.split()[0]}: forward-mode differentiation is not supported"
    for function in (CALLS[name], lambda x: torch.vmap(CALLS[name])(x[None])):
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(function, (MAP,), (MAP,))
    CALLS[name](MAP)
