"""Where the tests of the RoI operators run: on the CPU until their CUDA kernels are built, then over `device`."""

import pytest


@pytest.fixture
def roi_device():
    return "cpu"
