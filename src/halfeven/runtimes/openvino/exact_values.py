"""Tensors between two quantizers, in the form in which OpenVINO's CPU plugin keeps them, and how it rounds them.

Every form has `real()`, and `levels(ends)`: the integers of a quantizer that reads it. Where a value that is exactly
half-way lands depends on the order of the float32 operations, so each form has its own.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from halfeven.deployment.quantize_op import ExportedQuantizer

ONE_SHIFT = 5e-5
"""Channels whose shifts differ by less are all given the first one's."""


@dataclass(frozen=True, eq=False)
class Ends:
    """A quantizer as OpenVINO keeps it: the ends of a FakeQuantize in float32, and what the plugin makes of them.

    Levels count from 0. A grid whose zero is level 128 of 256 is kept as signed bytes where its readers take them. In
    the kernel of a layer the rounding then happens before 128 is added, everywhere else after it.
    """

    low: Tensor
    high: Tensor
    steps: int
    signed: bool = False
    rounds_signed: bool = False

    @staticmethod
    def of(quantizer: ExportedQuantizer, signed_readers: bool) -> "Ends":
        scale, zero_point = quantizer.scale, quantizer.zero_point.float()
        steps = quantizer.quant_max - quantizer.quant_min
        symmetric = steps == 255 and int(zero_point) - quantizer.quant_min == 128
        low, high = (quantizer.quant_min - zero_point) * scale, (quantizer.quant_max - zero_point) * scale
        return Ends(low, high, steps, symmetric and signed_readers)

    def moved(self, unit: Tensor, zero: Tensor | float = 0.0) -> "Ends":
        """The ends in units of a scale, counted from a byte that stands for 0; [] or one for each channel."""
        return replace(self, low=self.low / unit + zero, high=self.high / unit + zero)

    @property
    def scale(self) -> Tensor:
        return (self.high - self.low) / self.steps

    @property
    def zero_level(self) -> Tensor:
        """The level that stands for 0."""
        return torch.round(-self.low / self.scale)

    @property
    def slope(self) -> Tensor:
        # Tensor by tensor: a number divided by a tensor is a reciprocal and a product in PyTorch, which rounds twice.
        return torch.full_like(self.low, self.steps) / (self.high - self.low)

    @property
    def shift(self) -> Tensor:
        """The zero level as float32 arithmetic finds it, sometimes 120.99999 for 121."""
        return (-self.low * torch.full_like(self.low, self.steps)) / (self.high - self.low)

    @property
    def first(self) -> float:
        """The byte that stands for level 0."""
        return -128.0 if self.signed else 0.0

    @property
    def origin(self) -> float:
        """What stands for level 0 when it is rounded."""
        return self.first if self.rounds_signed else 0.0

    @property
    def offset(self) -> Tensor:
        """What is added before rounding; of signed bytes in a kernel nothing is, where as good as nothing is left."""
        offset = self.shift + self.origin
        return torch.where(offset.abs() < ONE_SHIFT, 0.0, offset) if self.rounds_signed else offset

    def in_kernel(self) -> "Ends":
        """The same ends where the quantizer is a part of a layer's kernel."""
        return replace(self, rounds_signed=self.signed)

    @property
    def zero_byte(self) -> Tensor:
        """The byte that stands for 0, as real arithmetic on bytes subtracts it: unrounded."""
        return torch.zeros_like(self.low) if self.signed else self.shift

    def is_left_out(self, source: "Ends", unit: Tensor) -> bool:
        """Whether the plugin leaves the quantizer out: it reads another one's integers, of a scale `unit`, and its ends
        are less than a byte away from theirs."""
        if self.steps != 255 or (self.signed, self.steps) != (source.signed, source.steps):
            return False
        ends = self.moved(unit, source.zero_byte)
        away = torch.stack([ends.low - source.first, ends.high - source.first - self.steps]).abs()
        return bool((away <= self.steps / (self.steps + 1)).all())

    def levels(self, x: Tensor, from_layer: bool = False) -> Tensor:
        """Levels 0 to `steps` of real values: one fused multiply-add, then rounding, then the clip.

        `from_layer`: the values come from a layer alone, whose kernel divides by a destination scale where there is
        no shift.
        """
        slope, offset = self.slope, self.offset
        if from_layer and self.steps == 255 and not bool(offset):
            one = torch.ones_like(slope)
            slope = one / (one / slope)  # the kernel is given 1 / slope, and multiplies by its reciprocal
        return self._rounded((x.double() * slope.double() + offset.double()).float())

    def levels_by_channel(self, x: Tensor) -> Tensor:
        """Levels where each channel has ends of its own: a product, then a sum that is the same for all channels
        unless they are far apart."""
        offset = self.offset
        first = offset.flatten()[0]
        if bool(((offset - first).abs() < ONE_SHIFT).all()):
            offset = first
        return self._rounded(x * self.slope + offset)

    def levels_in_attention(self, x: Tensor) -> Tensor:
        """Levels at the end of an attention that is one operator: a product, then a sum."""
        offset = torch.zeros_like(self.low) if self.rounds_signed else -self.low * self.slope
        return self._rounded(x * self.slope + offset)

    def _rounded(self, x: Tensor) -> Tensor:
        return (torch.round(x) - self.origin).clamp(0, self.steps)


class Special(Protocol):
    """What is known of a tensor beyond its real values."""

    def real(self) -> Tensor: ...

    def levels(self, ends: Ends) -> Tensor: ...


@dataclass(frozen=True)
class Levels:
    """A tensor on a quantizer's grid: unsigned levels, as float32 numbers."""

    values: Tensor
    ends: Ends
    unrounded: Tensor | None = None
    """What the quantizer clips, where the file as it is used does not round it."""

    @property
    def bytes(self) -> Tensor:
        return self.values + self.ends.first

    def real(self) -> Tensor:
        return (self.values - self.ends.zero_level) * self.ends.scale

    def levels(self, ends: Ends) -> Tensor:
        return self.scaled.levels(ends)

    @property
    def scaled(self) -> "Scaled":
        return Scaled(self.real(), self, self.ends.scale)


@dataclass(frozen=True)
class Scaled:
    """Integers times a number: of another scale, that is."""

    values: Tensor
    integers: Levels
    unit: Tensor

    def real(self) -> Tensor:
        return self.values

    def levels(self, ends: Ends) -> Tensor:
        return self.integers.values if ends.is_left_out(self.integers.ends, self.unit) else ends.levels(self.values)

    def clipped(self, bounds: tuple[float, float]) -> "Scaled":
        """Bytes are clipped at the bytes that lie between the bounds."""
        ends = self.integers.ends
        first, second = (bound / self.unit + ends.zero_byte for bound in bounds)  # the unit may be negative
        low, high = torch.minimum(first, second).ceil(), torch.maximum(first, second).floor()
        reals = [(byte - ends.zero_byte) * self.unit for byte in (low, high)]
        levels = Levels(self.integers.bytes.clamp(low, high) - ends.first, ends)
        return replace(self, values=self.values.clamp(torch.minimum(*reals), torch.maximum(*reals)), integers=levels)


@dataclass(frozen=True)
class Average:
    """Averages of the bytes of a tensor: of the integers, not of what they stand for."""

    values: Tensor
    ends: Ends

    def real(self) -> Tensor:
        return (self.values - self.ends.zero_byte) * self.ends.scale

    def levels(self, ends: Ends) -> Tensor:
        """The plugin moves the ends to where the bytes are: with one scale before and after, ties stay ties."""
        return ends.moved(self.ends.scale, self.ends.zero_byte).levels(self.values)


@dataclass(frozen=True)
class InUnits:
    """Real values divided by a scale: a sum that is taken in units of an operand's."""

    values: Tensor
    unit: Tensor
    from_layer: bool = False
    """Whether a layer's kernel takes the sum, and its quantizer then, where neither is watched."""

    def real(self) -> Tensor:
        return self.values * self.unit

    def levels(self, ends: Ends) -> Tensor:
        return ends.moved(self.unit).levels(self.values)


@dataclass(frozen=True)
class Products:
    """What a layer without a bias yields: exact sums, and a scale that the plugin merges into what follows.

    Without a bias nothing stands between the layer's scales and the ends of the quantizer, which it divides by them.
    """

    values: Tensor
    unit: Tensor
    """Of the sums: [], or one for each output channel in a shape that broadcasts over them."""
    scales: tuple[Tensor, Tensor] | None = None
    """Of both factors, where these are activations: what scales the products next goes into the second."""

    def real(self) -> Tensor:
        return self.values * self.unit

    def levels(self, ends: Ends) -> Tensor:
        moved = ends.moved(self.unit)
        slope = moved.slope.flatten()
        if not bool((slope == slope[0]).all()):
            return moved.levels_by_channel(self.values)
        one = replace(ends, low=moved.low.flatten()[0], high=moved.high.flatten()[0])
        return one.levels(self.values, from_layer=True)
