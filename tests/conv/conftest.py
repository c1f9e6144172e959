import pytest
import torch


@pytest.fixture(autouse=True)
def ieee_float32():
    """float32 means float32 on CUDA, too, unless a test allows tf32 itself."""
    before = torch._C._get_fp32_precision_getter("cuda", "conv")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
