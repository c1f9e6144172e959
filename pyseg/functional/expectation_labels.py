"""The E-step of weakly supervised segmentation."""

from typing import Literal, overload

import torch
from torch import Tensor

from pyseg._ops import expectation_labels as _op  # noqa: F401  registers the fake kernel


@overload
def expectation_labels(
    logits: Tensor,
    present: Tensor,
    *,
    background_bias: float = 0.0,
    foreground_bias: float = 0.0,
    background_share: float = 0.0,
    foreground_share: float = 0.0,
    exclude_absent: bool = True,
    sweeps: int = 16,
    valid: Tensor | None = None,
    ignore_index: int = -100,
    return_bias: Literal[False] = False,
) -> Tensor: ...
@overload
def expectation_labels(
    logits: Tensor,
    present: Tensor,
    *,
    background_bias: float = 0.0,
    foreground_bias: float = 0.0,
    background_share: float = 0.0,
    foreground_share: float = 0.0,
    exclude_absent: bool = True,
    sweeps: int = 16,
    valid: Tensor | None = None,
    ignore_index: int = -100,
    return_bias: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def expectation_labels(
    logits: Tensor,
    present: Tensor,
    *,
    background_bias: float = 0.0,
    foreground_bias: float = 0.0,
    background_share: float = 0.0,
    foreground_share: float = 0.0,
    exclude_absent: bool = True,
    sweeps: int = 16,
    valid: Tensor | None = None,
    ignore_index: int = -100,
    return_bias: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Most probable labels where only the classes of each image are known (Papandreou et al. 2015, 1502.02734).

        label[m] = argmax over the classes l that compete of f_l[m] + b_l

    the E-step of EM: f are the network's logits, b biases of the classes that the image has. EM-Fixed (algorithm 1)
    gives them as constants, b_fg > b_bg > 0. EM-Adapt asks for shares: the background takes at least k =
    floor(background_share * pixels) pixels, each present foreground class k = floor(foreground_share * pixels).
    Biases start at the constants (0 for absent classes) and rise in rounds over the present classes in ascending order,
    the background first. A class's margin in a pixel is the least bias with which it is above all others there,

        t_l[m] = (max over o != l of f_o[m] + b_o) - f_l[m],  up to the next number that makes the sum larger;

    if fewer than k margins are <= b_l, then b_l becomes the mean of the k-th smallest margin and the next larger one.
    So the class wins in exactly k pixels (in more only where margins are equal), and rounds end when none changes a
    bias, or after `sweeps`. This is coordinate descent on the dual of: maximise sum of f_label[m] over the labelings in
    which each class has its share. What holds then:

    - if the rounds ended by themselves, every class has its share, and, if the constants are 0 and margins differ, no
      labeling with these shares has a larger sum of scores (complementary slackness; up to rounding);
    - with one foreground class and shares of at most 1 together that takes one round;
    - otherwise the last class whose bias rose has its share, and others lack what it took from them: after 3 rounds
      1 %, after 10 at most 0.2 % of the pixels on random scores of 3 to 8 classes whose shares add up to 1.

    Shares of more than 1 together are divided by their sum. Equal scores go to the first class, and where so many
    margins are equal that no bias separates them (constant logits), shares are missed.

    Args:
        logits: [N, C, *S], S of 1 to 3 dimensions, C at most 2048: f. float32, float64, float16 or bfloat16, any
            strides (channels_last is read in place, only maps without an even step from pixel to pixel are copied).
            NaN counts as +inf.
        present: [N, C] bool, the image's labels; class 0 is the background and is present only where this says so.
        background_bias, foreground_bias: from 0 on, in units of the logits.
        background_share, foreground_share: of an image's valid pixels, from 0 to 1; 0 asks for nothing. The paper takes
            0.4 and 0.2.
        exclude_absent: absent classes get no pixel. False: they compete with bias 0, as in the paper's EM-Fixed.
        sweeps: the most rounds over the classes.
        valid: [N, *S] bool: pixels without it get ignore_index and count nowhere.
        ignore_index: also the label of all pixels of an image for which no class competes.
        return_bias: also returns b.

    Returns:
        labels [N, *S] int64; with return_bias also b [N, C], float64 for float64 logits, else float32, -inf for classes
        that do not compete: labels are the argmax of logits + b, of the first where several are equal.

    16-bit logits are compared in float32. No gradient: both results are constants. The same bits on the CPU for any
    number of threads, and on CUDA, where atomics add integers only and nothing waits for the device. O(N C |S|) time
    without shares; with shares O(N P^2 |S|) a round for P classes that compete, of whose logits alone a copy is kept
    (CPU: one image's a thread), and none of the others' are read.

    Raises:
        RuntimeError: a shape, dtype, device or number that does not fit.
    """
    labels, bias = torch.ops.pyseg.expectation_labels(
        logits,
        present,
        valid,
        background_bias,
        foreground_bias,
        background_share,
        foreground_share,
        exclude_absent,
        sweeps,
        ignore_index,
    )
    return (labels, bias) if return_bias else labels
