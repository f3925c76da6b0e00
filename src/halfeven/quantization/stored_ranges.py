"""Check the ranges that a checkpoint has set: each scale and zero point must be of its quantizer's grid."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from halfeven.quantization.arithmetic import SMALLEST_SCALE, scale_and_zero_point
from halfeven.quantization.fake_quantize import effective_scale
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.range_state import RangeState

LARGEST_DEVIATION = 0.25
"""Largest relative difference between a scale and that of the range stored beside it. A grid of one bit more or less
has a scale of half or twice the size."""

ROOM_OF_LEARNED_ZERO_POINTS = 2**16
"""Largest distance of a learned zero point from its grid. Where all values of a tensor lie on one side of 0, training
moves it on and on, by some units at each step at most; what is further away was not learned."""


def wrong_ranges(model: nn.Module) -> list[str]:
    """List the quantizers whose scale, zero point or range cannot be used, each with its fault."""
    return [
        f"{name}: {problem}" for name, quantizer in quantizers(model).items() for problem in _range_problems(quantizer)
    ]


@torch.no_grad()
def _range_problems(quantizer: Quantizer) -> Iterator[str]:
    scheme = quantizer.scheme
    if int(quantizer.observing) not in {state.code for state in RangeState}:
        yield f"the state {int(quantizer.observing)} does not exist"
    ends = [getattr(quantizer, end) for end in ("low", "high") if hasattr(quantizer, end)]
    # A range that is fixed has been set, so that NaN is a fault there.
    if not quantizer.state.fixed and all(bool(tensor.isnan().all()) for tensor in (quantizer.scale, *ends)):
        return  # no range is set
    scale = _scale_in_use(quantizer)
    if not all(bool(tensor.isfinite().all()) for tensor in (scale, *ends)):
        yield "its range is NaN or infinite"
        return
    if bool((scale < SMALLEST_SCALE).any() | (scale * scheme.levels).isinf().any()):
        yield f"no scale is {_shortened_values(scale)}"
    zero_point = quantizer.zero_point
    # A learned zero point may leave the grid, far at times; the nearest integer of the grid is used.
    room = ROOM_OF_LEARNED_ZERO_POINTS if zero_point.is_floating_point() else 0
    lowest = 0 if scheme.symmetric else scheme.quant_min - room
    highest = 0 if scheme.symmetric else scheme.quant_max + room
    if not bool(((zero_point >= lowest) & (zero_point <= highest)).all()):
        yield f"the zero point {_shortened_values(zero_point)} is not on the grid {scheme}"
    elif ends:
        yield from _disagreement(quantizer, *ends)


def _scale_in_use(quantizer: Quantizer) -> Tensor:
    """Return the scale in use: a learned one may be stored as a logarithm, or below zero."""
    scale = quantizer.scale.detach()
    if not quantizer.learned or not bool(scale.isfinite().all()):
        return scale
    return effective_scale(scale, quantizer.domain, quantizer.scheme.power_of_two)


def _disagreement(quantizer: Quantizer, low: Tensor, high: Tensor) -> Iterator[str]:
    scale, zero_point = scale_and_zero_point(low, high, quantizer.scheme)
    too_far = (quantizer.scale - scale).abs() > LARGEST_DEVIATION * scale
    moved = (quantizer.zero_point - zero_point).abs() > 1
    if bool((low > high).any() | too_far.any() | moved.any()):
        yield (
            f"scale {_shortened_values(quantizer.scale)} and zero point {_shortened_values(quantizer.zero_point)} are "
            f"not those of the range {_shortened_values(low)} to {_shortened_values(high)} on the grid "
            f"{quantizer.scheme}"
        )


def _shortened_values(values: Tensor) -> str:
    numbers = [f"{value:g}" for value in values.detach().float().flatten()[:3].tolist()]
    return numbers[0] if values.numel() == 1 else f"[{', '.join(numbers)}{', ...' if values.numel() > 3 else ''}]"
