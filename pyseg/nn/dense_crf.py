"""Dense CRFs as modules: one with fixed parameters, one that is trained."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyseg import functional as F
from pyseg.functional.pairwise_kernels import Compatibility, CrfAccuracy, Normalization

Sigma = float | Sequence[float]


class DenseCRF(nn.Module):
    r"""Refines a network's output by a fully connected CRF with fixed parameters: `pyseg.functional.dense_crf`.

        crf = DenseCRF(iterations=5)
        marginals = crf(model(normalised), photo)  # photo [N, 3, H, W] with values from 0 to 255

    Args:
        from_logits: `forward` takes logits, -log_softmax of which are the unary energies; False: energies themselves.
        iterations, smoothness, smoothness_sigma, appearance, spatial_sigma, color_sigma, normalization, accuracy,
        temperature, output: as in `pyseg.functional.dense_crf`; compatibilities that are tensors become buffers.

    Shapes: logits [N, C, *S] and image [N, K, *S] (or None: smoothness alone), or lists of [C, *S_n] and [K, *S_n].
    Gradients reach the logits.
    """

    smoothness: Compatibility | None
    appearance: Compatibility | None

    def __init__(
        self,
        *,
        iterations: int = 5,
        smoothness: Compatibility | None = 3.0,
        smoothness_sigma: Sigma = 3.0,
        appearance: Compatibility | None = 10.0,
        spatial_sigma: Sigma = 80.0,
        color_sigma: Sigma = 13.0,
        normalization: Normalization = "symmetric",
        accuracy: CrfAccuracy = "fast",
        temperature: float = 1.0,
        output: Literal["marginals", "labels", "logits"] = "marginals",
        from_logits: bool = True,
    ):
        super().__init__()
        self.iterations = iterations
        self.smoothness_sigma = smoothness_sigma
        self.spatial_sigma = spatial_sigma
        self.color_sigma = color_sigma
        self.normalization: Normalization = normalization
        self.accuracy: CrfAccuracy = accuracy
        self.temperature = temperature
        self.output: Literal["marginals", "labels", "logits"] = output
        self.from_logits = from_logits
        for name, value in (("smoothness", smoothness), ("appearance", appearance)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(
        self, logits: Tensor | Sequence[Tensor], image: Tensor | Sequence[Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        unary: Any = self._unary(logits) if isinstance(logits, Tensor) else [self._unary(one, 0) for one in logits]
        guide: Any = image
        return F.dense_crf(
            unary,
            guide,
            iterations=self.iterations,
            smoothness=self.smoothness,
            smoothness_sigma=self.smoothness_sigma,
            appearance=self.appearance,
            spatial_sigma=self.spatial_sigma,
            color_sigma=self.color_sigma,
            normalization=self.normalization,
            accuracy=self.accuracy,
            temperature=self.temperature,
            output=self.output,
        )

    def _unary(self, logits: Tensor, axis: int = 1) -> Tensor:
        return -logits.log_softmax(axis) if self.from_logits else logits

    def extra_repr(self) -> str:
        return (
            f"iterations={self.iterations}, smoothness_sigma={self.smoothness_sigma}, "
            f"spatial_sigma={self.spatial_sigma}, color_sigma={self.color_sigma}, accuracy={self.accuracy}"
        )


class CRFasRNN(nn.Module):
    r"""Mean field whose weights are learned with the network before it (Zheng et al. 2015, 1502.03240).

        E_i(l) = -logits_i(l) + sum over l' of mu(l, l') (w_a(l') a_i(l') + w_s(l') s_i(l'))

    with the messages a of the appearance kernel and s of the smoothness kernel, iterated as in
    `pyseg.functional.dense_crf`. Parameters: the kernels' weights w_a, w_s [C] and the compatibility mu [C, C], which
    starts as the Potts model's costs.

    Args:
        num_classes: C.
        spatial_sigma, color_sigma, smoothness_sigma: the paper's theta_alpha (160 pixels), theta_beta (3, for images
            from 0 to 255) and theta_gamma (3 pixels).
        appearance, smoothness: initial weights of the two kernels, 5 and 3.
        iterations, eval_iterations: 5 in training mode and 10 in eval mode, as in the paper (section 7).
        normalization: "after", so that messages are weighted means; accuracy: as in `pyseg.functional.dense_crf`.

    `forward(logits [N, C, *S], image [N, K, *S])` returns logits, -E of the last iteration: for a cross-entropy, or
    softmax them. Gradients reach logits and parameters; the lattice is built once a call and serves all iterations,
    forward and backward.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        spatial_sigma: Sigma = 160.0,
        color_sigma: Sigma = 3.0,
        smoothness_sigma: Sigma = 3.0,
        appearance: float = 5.0,
        smoothness: float = 3.0,
        iterations: int = 5,
        eval_iterations: int = 10,
        normalization: Normalization = "after",
        accuracy: CrfAccuracy = "fast",
    ):
        super().__init__()
        if num_classes < 2:
            raise RuntimeError(f"CRFasRNN: num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.spatial_sigma = spatial_sigma
        self.color_sigma = color_sigma
        self.smoothness_sigma = smoothness_sigma
        self.iterations = iterations
        self.eval_iterations = eval_iterations
        self.normalization: Normalization = normalization
        self.accuracy: CrfAccuracy = accuracy
        self.appearance = nn.Parameter(torch.full((num_classes,), float(appearance)))
        self.smoothness = nn.Parameter(torch.full((num_classes,), float(smoothness)))
        self.compatibility = nn.Parameter(1 - torch.eye(num_classes))

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
        # Inference must give what training gave, so without the grid of every second pixel.
        accuracy: CrfAccuracy = "high" if self.accuracy == "fast" else self.accuracy
        smoothness = F.GaussianKernel(
            self.smoothness_sigma, self.compatibility * self.smoothness, self.normalization, accuracy
        )
        return F.dense_crf(
            -logits,
            image,
            iterations=self.iterations if self.training else self.eval_iterations,
            smoothness=None,
            kernels=[smoothness],
            appearance=self.compatibility * self.appearance,
            spatial_sigma=self.spatial_sigma,
            color_sigma=self.color_sigma,
            normalization=self.normalization,
            accuracy=self.accuracy,
            output="logits",
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, spatial_sigma={self.spatial_sigma}, color_sigma={self.color_sigma}, "
            f"smoothness_sigma={self.smoothness_sigma}, iterations={self.iterations}, "
            f"eval_iterations={self.eval_iterations}"
        )
