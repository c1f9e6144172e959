"""FuseNet: an encoder for colour, one for depth whose features are added to it, and a decoder with memorised unpooling.

Hazirbas, Ma, Domokos and Cremers, "FuseNet: Incorporating depth into semantic segmentation via fusion-based CNN
architecture", ACCV 2016. The decoder predicts at every resolution, as in Ma, Stueckler, Kerl and Cremers, "Multi-view
deep learning for consistent semantic mapping with RGB-D cameras", 2017 (1703.08866), section III.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def _block(in_channels: int, out_channels: int, convolutions: int) -> nn.Sequential:
    """3x3 convolutions, each with batch norm and ReLU (CBR of the paper's figure 2)."""
    layers: list[nn.Module] = []
    for i in range(convolutions):
        layers.append(nn.Conv2d(out_channels if i else in_channels, out_channels, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class FuseNet(nn.Module):
    """Sparse fusion (SF): before each pooling, the depth branch's features are added to those of the colour branch.

    A decoder stage puts the features back where the colour branch's maxima were (torch's max_unpool2d on the indices of
    max_pool2d, as in SegNet), zeros elsewhere, and convolves them.

    Args:
        classes: C of the predictions.
        widths: channels of each encoder stage, full resolution first; the paper's VGG-16 is (64, 128, 256, 512, 512).
        convolutions: of each stage; the paper's are (2, 2, 3, 3, 3).
        dropout: after the two deepest fusions and in the decoder's deepest stage; the paper's is 0.5.

    Input: image [N, 3, H, W] and depth [N, 1, H, W], H and W multiples of 2 ** (len(widths) - 1).
    Output: logits [N, C, H / 2 ** s, W / 2 ** s] for s = 0, 1, .., len(widths) - 1: what multiscale_cross_entropy
    takes.
    """

    def __init__(
        self,
        classes: int,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        convolutions: Sequence[int] = (2, 2, 3, 3, 3),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or len(widths) != len(convolutions):
            raise ValueError(
                f"FuseNet: convolutions must be as many as widths, 2 or more, got {len(convolutions)} and {len(widths)}"
            )
        ins = [3, *widths[:-1]]
        self.rgb = nn.ModuleList(_block(a, b, n) for a, b, n in zip(ins, widths, convolutions, strict=True))
        ins = [1, *widths[:-1]]
        self.depth = nn.ModuleList(_block(a, b, n) for a, b, n in zip(ins, widths, convolutions, strict=True))
        # Stage s convolves the features of stage s + 1, unpooled to resolution s.
        self.decoder = nn.ModuleList(
            _block(width, width, n) for width, n in zip(widths[:-1], convolutions[:-1], strict=True)
        )
        # Unpooling puts features where maxima of `width` channels were: these come down to as many first.
        self.narrow = nn.ModuleList(
            nn.Conv2d(below, width, 1) if below != width else nn.Identity()
            for width, below in itertools.pairwise(widths)
        )
        self.predict = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, image: Tensor, depth: Tensor) -> list[Tensor]:
        places, x, d = [], image, depth
        last = len(self.rgb) - 1
        for s, (rgb, of_depth) in enumerate(zip(self.rgb, self.depth, strict=True)):
            d = of_depth(d)
            x = rgb(x) + d
            if s >= last - 1:
                x = self.dropout(x)
            if s < last:
                x, where = F.max_pool2d(x, 2, return_indices=True)
                d = F.max_pool2d(d, 2)
                places.append(where)
        logits = [self.predict[last](x)]
        for s in range(last - 1, -1, -1):
            x = F.max_unpool2d(self.narrow[s](x), places[s], [2, 2])
            x = self.decoder[s](x)
            if s == last - 1:
                x = self.dropout(x)
            logits.append(self.predict[s](x))
        return logits[::-1]
