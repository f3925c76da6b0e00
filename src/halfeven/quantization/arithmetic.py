"""The arithmetic of uniform quantization, as pure functions on tensors.

An integer is `clamp(round(x / scale) + zero_point, quant_min, quant_max)`, rounded to nearest with ties to even, and
stands for `(integer - zero_point) * scale` ("A White Paper on Neural Network Quantization", arXiv 2106.08295, section
2.2).
"""

import torch
from torch import Tensor

from halfeven.quantization.scheme import Scheme

SIGNIFICAND_BITS = 16
"""Significand bits of a scale: few enough that (scale, zero_point) -> (low, high) -> scale is lossless in float32."""

SMALLEST_EXPONENT = -40
SMALLEST_SCALE = 2.0**SMALLEST_EXPONENT
"""Lower bound of scales: products of two scales and their reciprocals stay normal float32 numbers."""

NEAR_ZERO = 1e-6
"""A lower end of a range of 8 bits that is nearer to 0 is taken for 0 by some runtimes."""


RANGE_MOMENTUM = 0.01
"""Weight of a training batch in the moving average of an observed activation range."""


def snap(scale: Tensor) -> Tensor:
    """Round float32 scales, of any shape, to `SIGNIFICAND_BITS` significand bits, ties to even."""
    # A float32 number has 24 significand bits (the first is not stored); the lowest `dropped` of them become 0.
    dropped = 24 - SIGNIFICAND_BITS
    # On the bit pattern: adding half of the last bit kept, less one where that bit is even, carries as rounding does.
    bits = scale.detach().float().view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    bits = (bits + half + ((bits >> dropped) & 1)) & ~((1 << dropped) - 1)
    return bits.view(torch.float32)


def power_of_two_above(scale: Tensor) -> Tensor:
    """Return the smallest powers of two that are not below float32 scales of any shape (TQT, arXiv 1903.08066, 3.2).

    Rounding up keeps the whole range on the grid.
    """
    # The 23 stored significand bits are 0 in a power of two; adding them all carries into the exponent otherwise.
    stored = (1 << 23) - 1
    bits = scale.detach().float().view(torch.int32)
    return ((bits + stored) & ~stored).view(torch.float32)


def representable(scale: Tensor, power_of_two: bool = False) -> Tensor:
    """Return the scales that files carry for float32 scales: snapped, or rounded up to powers of two."""
    return power_of_two_above(scale) if power_of_two else snap(scale)


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a float range (white paper, section 2.2). Zero lies exactly on the grid.

    A range of 8 bits with a lower end nearer to 0 than `NEAR_ZERO` becomes symmetric around 0.

    A dead channel (an empty range at zero) takes the largest scale of the other channels, or 1 / quant_max where all
    channels are dead.

    Args:
        low, high: ends of the range, [] or [channels], float32; widened to contain 0.
        scheme: the grid.

    Returns:
        scale (float32, snapped) and zero_point (int32, an integer of the grid), shaped like `low`.
    """
    # White paper, section 2.2: the range is widened to contain 0, because zero padding and ReLU must give 0 exactly.
    low = low.float().clamp(max=0.0)
    high = high.float().clamp(min=0.0)
    if scheme.symmetric:
        # The divisor is 2^(b-1) - 1, so the range itself never reaches the integer -2^(b-1) of a grid that is not
        # narrow.
        largest = torch.maximum(-low, high) if scheme.signed else high
        scale = largest / scheme.quant_max
    else:
        scale = (high - low) / (scheme.quant_max - scheme.quant_min)
    # The weights of a dead channel are 0 on any grid. Its bias need not be: on a large scale it still fits in the 32
    # bits of runtimes that store it as an integer on the grid of the products.
    alive = scale > SMALLEST_SCALE
    fallback = torch.where(alive, scale, 0.0).amax()
    fallback = torch.where(fallback > 0, fallback, 1.0 / scheme.quant_max)
    # Snapped before the zero point is computed, so that both belong to the same grid.
    scale = representable(torch.where(alive, scale, fallback), scheme.power_of_two)
    if scheme.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    # White paper, section 2.2: z = quant_min - round(low / s). Rounding moves the range by up to half a step, so that 0
    # is an integer of the grid; the clamp keeps it on the grid.
    zero_point = scheme.quant_min - torch.round(low / scale)
    zero_point = on_grid(zero_point, scheme.quant_min, scheme.quant_max, scheme.power_of_two)
    if scheme.quant_max - scheme.quant_min == 255:
        # A runtime takes so near a lower limit for 0, and forgets the zero point. At 128 it has none to forget.
        limit = (scheme.quant_min - zero_point) * scale
        near = (limit < 0) & (limit > -NEAR_ZERO)
        centred = representable(torch.maximum(low / -128, high / 127), scheme.power_of_two)
        scale = torch.where(near, centred, scale)
        zero_point = torch.where(near, scheme.quant_min + 128, zero_point)
    return scale, zero_point.to(torch.int32)


def moved_range(
    low: Tensor, high: Tensor, batch_low: Tensor, batch_high: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a range that was moved towards that of a batch, with its scale and zero point; all of one shape."""
    # The ends are averaged, and scale and zero point made of them: so both belong to the same range.
    low = torch.lerp(low, batch_low, RANGE_MOMENTUM)
    high = torch.lerp(high, batch_high, RANGE_MOMENTUM)
    return low, high, *scale_and_zero_point(low, high, scheme)


def on_grid(zero_point: Tensor, quant_min: int, quant_max: int, even: bool) -> Tensor:
    """Return the nearest integers of a grid to zero points; with `even`, the nearest even ones.

    Sums and products on grids with power-of-two scales often lie in the middle between two integers. Runtimes round
    such ties after they have added the zero point, and to even means the same before and after only if it is even.
    """
    if not even:
        return torch.clamp(torch.round(zero_point), quant_min, quant_max)
    # The ends must be even as well: quant_max is odd on every grid, quant_min on narrow grids alone, which have no zero
    # point.
    return torch.clamp(2 * torch.round(zero_point / 2), quant_min, quant_max - quant_max % 2)


def per_channel(values: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Reshape per-channel values [channels] to broadcast over a tensor with `ndim` axes; scalars (axis None) stay."""
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Return the integers of `x` on the scheme's grid, shaped like `x`, as float32, which is exact up to 2^24."""
    scale = per_channel(scale, scheme.axis, x.ndim)
    zero_point = per_channel(zero_point, scheme.axis, x.ndim)
    # The order of ONNX's QuantizeLinear. A product with 1 / s gives another integer near ties, and so does rounding
    # after the zero point is added: with an odd zero point, ties to even go the other way.
    return torch.clamp(torch.round(x.float() / scale) + zero_point, scheme.quant_min, scheme.quant_max)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Return the real values of integers, (integer - zero_point) * scale, shaped like `integers`."""
    scale = per_channel(scale, scheme.axis, integers.ndim)
    # The difference of two small integers is exact in float32: the product is the only rounding.
    return (integers - per_channel(zero_point, scheme.axis, integers.ndim)) * scale
