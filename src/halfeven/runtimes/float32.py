"""The float32 arithmetic of kernels, where it differs from torch's."""

from torch import Tensor


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c, rounded to float32 once."""
    # Two float32 significands of 24 bits have a product of 48, so it is exact in float64. The sum is rounded to 53 bits
    # before it is rounded to 24: that differs from a single rounding within 2^-29 of a unit in the last place of a tie.
    return (a.double() * b.double() + c.double()).float()
