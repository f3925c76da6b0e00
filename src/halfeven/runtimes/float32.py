"""The float32 arithmetic of kernels, where it differs from torch's."""

from torch import Tensor


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c, rounded to float32 once."""
    return (a.double() * b.double() + c.double()).float()
