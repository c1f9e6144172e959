"""How tests with Hypothesis draw: the same cases in every run, whatever the machine's speed, fewer on the fake GPU."""

from hypothesis import HealthCheck, settings


def drawn_settings(examples, cuda_examples=None, device="cpu"):
    """The decorator for `examples` cases on the CPU, `cuda_examples` on CUDA."""
    return settings(
        max_examples=examples if device == "cpu" else cuda_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
