"""Decide how the ranges of a tensor move in training."""

from typing import cast

from halfeven.placement.options import QuantizationOptions
from halfeven.quantization.quantizer import Ranges
from halfeven.quantization.scheme import parse_bits

LEARNED_BITS = 4
"""Largest number of bits at which learned ranges are the default. On mobilenetv2 at W4A4 they end 3 points above
observed ones after 100 steps (`docs/measurements/qat.md`); at 8 bits both end alike, and observed ones cost less."""


def ranges_in_training(options: QuantizationOptions, bits: int) -> Ranges:
    """Return how the range of a tensor moves in training.

    Args:
        options: `ranges`, and for "auto" the bits of the scheme: where the weights have 4 bits, activations of 8 bits
            learn with them.
        bits: those of the tensor.
    """
    if options.ranges != "auto":
        return cast(Ranges, options.ranges)
    return "learned" if min(bits, *parse_bits(options.scheme)) <= LEARNED_BITS else "observed"
