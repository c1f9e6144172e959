"""torch's reading of strides as a memory format, the same as csrc/common/memory_format.h, in traced code too."""

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides of an [N, C, *S] tensor say channels_last (of two or three axes) and can mean nothing else.

    torch's own suggest_memory_format takes a map for contiguous if its number of images is data, unknown while code is
    traced; here such a map counts as not empty.
    """
    size, stride = tensor.shape, tensor.stride()
    if tensor.dim() not in (4, 5) or guard_or_true(stride[1] == 0):
        return False
    least = 0
    for axis in (1, *range(tensor.dim() - 1, 1, -1)):
        if guard_or_true(size[axis] == 0) or guard_or_true(stride[axis] < least):
            return False
        least = stride[axis] * size[axis]
    one_element = guard_or_true(least == stride[1])  # an image of one channel and pixel
    return not (guard_or_false(size[0] == 0) or guard_or_true(stride[0] < least) or one_element)
