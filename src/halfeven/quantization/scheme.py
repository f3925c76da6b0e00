"""The integer grid of a tensor, and the elements that share a scale."""

import re
from dataclasses import dataclass
from typing import Annotated

from halfeven.errors import ConfigError
from halfeven.options import Options, at_least, at_most, fits

MIN_BITS = 2
MAX_BITS = 16
Bits = Annotated[int, at_least(MIN_BITS), at_most(MAX_BITS)]


@dataclass(frozen=True, kw_only=True)
class Scheme(Options):
    """Bits, signedness, symmetry, range and granularity of one tensor (white paper, section 2.2).

    Raises:
        ConfigError: bits outside 2 to 16, or a narrow range on an unsigned grid.
    """

    bits: Bits = 8
    """Width of an integer, 2 to 16."""
    signed: bool = False
    """Signed grid, [-2^(b-1), 2^(b-1) - 1], or unsigned, [0, 2^b - 1]."""
    symmetric: bool = False
    """Zero point fixed at 0."""
    narrow: bool = False
    """Signed only: leave out the most negative integer, so that the grid is symmetric about 0."""
    axis: int | None = None
    """Axis with a scale for each of its channels; None: one scale for the tensor."""
    power_of_two: bool = False
    """Scales are powers of two, so that a runtime without multipliers can shift instead."""

    def __post_init__(self) -> None:
        if self.narrow and not self.signed:
            raise ConfigError(
                "A narrow range was asked for on an unsigned grid, which has no most negative integer "
                "to leave out. Set signed=True or narrow=False."
            )

    @property
    def quant_min(self) -> int:
        """Smallest integer of the grid."""
        # A bool counts as 0 or 1: the narrow grid begins a step later.
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Largest integer of the grid."""
        return int(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @property
    def levels(self) -> int:
        """Number of integers of the grid."""
        return self.quant_max - self.quant_min + 1

    def __str__(self) -> str:
        kind = f"{'s' if self.signed else 'u'}{self.bits}"
        words = [kind, "symmetric" if self.symmetric else "asymmetric"]
        words += ["narrow"] if self.narrow else []
        words += [f"per channel (axis {self.axis})"] if self.axis is not None else ["per tensor"]
        words += ["power-of-two scale"] if self.power_of_two else []
        return " ".join(words)


BITS_NAMED_FOR_FLOAT = 16
"""Bits that a scheme's name gives to activations that are not quantized."""


def parse_bits(name: str) -> tuple[int, int]:
    """Read a scheme name such as "w8a8" or "w4a8" into (weight bits, activation bits).

    Activations of 16 bits (`BITS_NAMED_FOR_FLOAT`) stay in floating point: "w8a16" and "w4a16" quantize weights alone.

    Raises:
        ConfigError: the name does not have that form.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", name.lower())
    if match is None:
        raise ConfigError(
            f'The scheme "{name}" cannot be read. It names the bits of weights and activations: '
            'write it like "w8a8" or "w4a8".'
        )
    weight_bits = int(match[1])
    activation_bits = int(match[2])
    for bits in (weight_bits, activation_bits):
        if not fits(Bits, bits):
            raise ConfigError(
                f'The scheme "{name}" asks for {bits} bits; integer grids here have {MIN_BITS} to {MAX_BITS} bits. '
                'Choose widths in that interval, such as "w4a8".'
            )
    return weight_bits, activation_bits
