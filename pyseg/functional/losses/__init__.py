"""Segmentation losses. What all of them share is written here; their formulas, papers and own arguments are theirs.

    input            logits [N, C, *S] with 1 to 3 spatial dimensions (losses on boundaries: 2 or 3); float32, float64,
                     float16 or bfloat16, contiguous or channels_last without a copy.
    target           labels [N, *S] of any integer dtype in [0, C), or soft or one-hot targets [N, C, *S], float or
                     integer (soft ones have no ignore_index). binary: C = 1, labels or soft targets [N, *S] or [N, 1,
                     *S]. multilabel: [N, C, *S].
    mode             "multiclass": p = softmax over C; "multilabel", "binary": p = sigmoid of each element.
    from_logits      False: `input` holds the probabilities p, and logarithms end at -100.
    weight           [C], tensor or sequence: a class's weight. A mean of region losses divides by the weights' sum.
    classes          which classes take part (all); include_background=False leaves out class 0 of several.
    absent           what a class without target pixels does: "include": the formula as it is; "zero": loss 0, but it
                     counts in the mean; "skip": it is left out.
    smooth           added to numerator and denominator; a pair (numerator, denominator) sets them apart.
    ignore_index     a label, or an integer in a dense target, that takes its pixel or element out
    label_smoothing  g becomes (1 - e) * g + e / C (independent classes: e / 2).
    batch            statistics over the batch, not per image; group: a torch.distributed process group, over whose
                     processes they are summed too (batch=True where there is the choice). The gradient is that of the
                     sum of all processes' losses, which DistributedDataParallel's average turns into that of the one
                     loss.
    reduction        "mean", "sum", or "none", whose shape each family's module states.

The result is float32 for 16-bit and float32 logits, float64 for float64. Sums accumulate in float32 over short blocks
and in float64 beyond. Gradients are those of `input` alone; a second derivative raises.

Nothing is NaN that need not be: a ratio of nothing to nothing is a perfect score, a mean over nothing is 0, gradients
there are 0. So all-ignored images and empty batches have loss 0 in region losses with smooth=0 and in all means over
pixels.

Labels outside [0, C) that are not ignore_index raise RuntimeError on the CPU; on CUDA, which is not synchronised, they
make the loss NaN. In losses on boundaries they belong to no class there, and in compiled graphs. Wrong shapes and names
raise RuntimeError or ValueError with argument, expected and got.

The same bits come out in every run, on the CPU for any number of threads. Region, pixel and compound losses read the
logits once forward and once backward, O(N C S), and hold no map: neither a softmax nor a one-hot target.
"""

from pyseg.functional.losses.boundary import boundary_loss as boundary_loss
from pyseg.functional.losses.boundary import hausdorff_dt_loss as hausdorff_dt_loss
from pyseg.functional.losses.boundary import hausdorff_er_loss as hausdorff_er_loss
from pyseg.functional.losses.boundary import shape_aware_loss as shape_aware_loss
from pyseg.functional.losses.compound import combo_loss as combo_loss
from pyseg.functional.losses.compound import dice_ce_loss as dice_ce_loss
from pyseg.functional.losses.compound import dice_focal_loss as dice_focal_loss
from pyseg.functional.losses.compound import exponential_logarithmic_loss as exponential_logarithmic_loss
from pyseg.functional.losses.compound import unified_focal_loss as unified_focal_loss
from pyseg.functional.losses.distribution import balanced_cross_entropy as balanced_cross_entropy
from pyseg.functional.losses.distribution import cross_entropy as cross_entropy
from pyseg.functional.losses.distribution import focal_loss as focal_loss
from pyseg.functional.losses.distribution import ohem_cross_entropy as ohem_cross_entropy
from pyseg.functional.losses.distribution import sigmoid_focal_loss as sigmoid_focal_loss
from pyseg.functional.losses.distribution import topk_cross_entropy as topk_cross_entropy
from pyseg.functional.losses.distribution import unet_border_weights as unet_border_weights
from pyseg.functional.losses.distribution import weighted_binary_cross_entropy as weighted_binary_cross_entropy
from pyseg.functional.losses.multiscale import multiscale_cross_entropy as multiscale_cross_entropy
from pyseg.functional.losses.multiscale import pool_labels as pool_labels
from pyseg.functional.losses.point_supervision import point_supervision_loss as point_supervision_loss
from pyseg.functional.losses.point_supervision import points_to_labels as points_to_labels
from pyseg.functional.losses.region import dice_loss as dice_loss
from pyseg.functional.losses.region import focal_tversky_loss as focal_tversky_loss
from pyseg.functional.losses.region import generalized_dice_loss as generalized_dice_loss
from pyseg.functional.losses.region import jaccard_loss as jaccard_loss
from pyseg.functional.losses.region import log_cosh_dice_loss as log_cosh_dice_loss
from pyseg.functional.losses.region import lovasz_hinge_loss as lovasz_hinge_loss
from pyseg.functional.losses.region import lovasz_softmax_loss as lovasz_softmax_loss
from pyseg.functional.losses.region import mcc_loss as mcc_loss
from pyseg.functional.losses.region import sensitivity_specificity_loss as sensitivity_specificity_loss
from pyseg.functional.losses.region import tversky_loss as tversky_loss

__all__ = [
    "balanced_cross_entropy",
    "boundary_loss",
    "combo_loss",
    "cross_entropy",
    "dice_ce_loss",
    "dice_focal_loss",
    "dice_loss",
    "exponential_logarithmic_loss",
    "focal_loss",
    "focal_tversky_loss",
    "generalized_dice_loss",
    "hausdorff_dt_loss",
    "hausdorff_er_loss",
    "jaccard_loss",
    "log_cosh_dice_loss",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "mcc_loss",
    "multiscale_cross_entropy",
    "ohem_cross_entropy",
    "point_supervision_loss",
    "points_to_labels",
    "pool_labels",
    "sensitivity_specificity_loss",
    "shape_aware_loss",
    "sigmoid_focal_loss",
    "topk_cross_entropy",
    "tversky_loss",
    "unet_border_weights",
    "unified_focal_loss",
    "weighted_binary_cross_entropy",
]
