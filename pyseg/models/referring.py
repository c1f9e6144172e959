"""Segmentation of what an expression in natural language refers to.

Hu, Rohrbach and Darrell, "Segmentation from Natural Language Expressions", ECCV 2016 (1603.06180), at a small scale: a
fully convolutional encoder of the image, a recurrent one of the sentence, both joined with the pixels' coordinates in
1x1 convolutions, and bilinear upsampling of the response to the image's size. Where the paper's visual features come
from a network that was trained before, these are learnt with the rest; atrous convolutions behind the fusion let pixels
see what lies around them, which "left of the blue disc" needs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyseg._ops.fuse_query import COORDINATES
from pyseg.functional import bilinear_upsample
from pyseg.nn import AtrousConv2d, FuseQuery


class SentenceEncoder(nn.Module):
    """Words to a vector: an embedding and an LSTM, whose state after the last word it is (section 3.2).

    The forget gates start open (their bias at 2): with torch's own start at 0 a state halves with every word, and the
    first of a long sentence are learnt late.

    Args:
        words: size of the vocabulary. Word 0 is none: it fills up short sentences.
        embedding: channels of a word.
        channels: of the result.

    Input: words [N, L] of int64, each sentence from the left, at least one word long. Result: [N, channels].
    """

    def __init__(self, words: int, embedding: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, channels, batch_first=True)
        nn.init.constant_(self.lstm.get_parameter("bias_ih_l0")[channels : 2 * channels].detach(), 2)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(words))
        last = (words != 0).sum(1) - 1
        return states[torch.arange(len(words), device=words.device), last]


class _Context(nn.Module):
    """A residual atrous convolution."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        self.conv = AtrousConv2d(channels, channels, 3, padding=rate, dilation=rate, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class ReferringSegmenter(nn.Module):
    """Logits of the pixels that a sentence refers to.

    Args:
        words: size of the vocabulary, see `SentenceEncoder`.
        embedding: channels of a word.
        sentence_channels: of a sentence.
        visual_channels: of the encoder's layers: the first of stride 2, the second of stride 4, then at that stride.
        fused_channels: behind the fusion.
        rates: of the atrous convolutions behind the fusion.

    Input: images [N, 3, H, W] and words [M, L] with M a multiple of N: as many sentences for each image, those of an
    image after each other. The encoder runs once for each image. Result: [M, H, W].
    """

    def __init__(
        self,
        words: int,
        embedding: int = 32,
        sentence_channels: int = 64,
        visual_channels: Sequence[int] = (24, 48, 64, 64),
        fused_channels: int = 64,
        rates: Sequence[int] = (1, 2, 4, 8),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, channels in enumerate(visual_channels):
            layers += [nn.Conv2d(before, channels, 3, 2 if i < 2 else 1, 1, bias=False), nn.BatchNorm2d(channels)]
            layers += [nn.ReLU(inplace=True)]
            before = channels
        self.visual = nn.Sequential(*layers)
        self.sentence = SentenceEncoder(words, embedding, sentence_channels)
        self.fuse = FuseQuery(before, sentence_channels, fused_channels, normalize=True, relu=True)
        # Vectors of length one need weights of about one to make numbers of about one.
        nn.init.normal_(self.fuse.weight.detach()[:, :-COORDINATES])
        nn.init.normal_(self.fuse.weight.detach()[:, -COORDINATES:], std=0.4)
        self.context = nn.Sequential(*(_Context(fused_channels, rate) for rate in rates))
        self.classify = nn.Conv2d(fused_channels, 1, 1)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        return self.segment(self.visual(images), self.sentence(words), images.shape[2:])

    def segment(self, features: Tensor, sentences: Tensor, size: Sequence[int]) -> Tensor:
        """From the encoders' outputs [N, C, h, w] and [M, D] to [M, *size]."""
        each = len(sentences) // max(1, len(features))
        fused = self.fuse(features.repeat_interleave(each, 0), sentences)
        response = self.classify(self.context(fused))
        return bilinear_upsample(response, tuple(size)).squeeze(1)
