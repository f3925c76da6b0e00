"""Tensors between two quantizers, in the forms in which OpenVINO's CPU plugin keeps them, each with its rounding.

Every form has `real()`, its values, and `codes(limits)`, the integers of a quantizer that reads it. Where a value that
is exactly half-way lands depends on the order of the float32 operations, so each form has an order of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.runtimes.simulation import Simulated

SHIFT_TOLERANCE = 5e-5
"""Channels whose shifts differ by less are all given the first channel's."""


LOST_ZERO_POINT = 1e-6
"""The plugin takes a lower limit nearer to 0 for one of a grid without a zero point, and keeps signed bytes."""


@dataclass(frozen=True, eq=False)
class FakeQuantizeRange:
    """A quantizer as OpenVINO keeps it: the limits of a FakeQuantize in float32, and the constants made of them.

    Codes count from 0. A grid whose zero is code 128 of 256 is kept as signed bytes where its readers take them. In
    the kernel of a layer the rounding then happens before 128 is added, everywhere else after it.
    """

    low: Tensor
    high: Tensor
    steps: int
    signed: bool = False
    rounds_signed: bool = False
    lost: float = 0.0
    """Codes between the zero that the limits give and code 128, which the plugin takes for it: the real values of all
    codes are off by as many steps, where the lower limit is tiny (layer scales of 1e-6 make such tensors)."""

    @staticmethod
    def of(quantizer: ExportedQuantizer, signed_readers: bool) -> "FakeQuantizeRange":
        scale = quantizer.scale
        zero_point = quantizer.zero_point.float()
        steps = quantizer.quant_max - quantizer.quant_min
        # 128 of 256 codes: only there do signed bytes have a zero point of 0.
        symmetric = steps == 255 and int(zero_point) - quantizer.quant_min == 128
        # The limits as the file has them. A scale of 16 significant bits times an integer of 8 bits is exact in
        # float32.
        low = (quantizer.quant_min - zero_point) * scale
        high = (quantizer.quant_max - zero_point) * scale
        loses = steps == 255 and signed_readers and bool((low < 0) & (low > -LOST_ZERO_POINT))
        lost = float(zero_point) - quantizer.quant_min - 128 if loses else 0.0
        return FakeQuantizeRange(low, high, steps, (symmetric and signed_readers) or loses, lost=lost)

    def moved(self, unit: Tensor, zero: Tensor | float = 0.0) -> "FakeQuantizeRange":
        """Return the range in units of a scale, [] or [channels], counted from the byte that represents 0."""
        return replace(self, low=self.low / unit + zero, high=self.high / unit + zero)

    @property
    def scale(self) -> Tensor:
        return (self.high - self.low) / self.steps

    @property
    def zero_code(self) -> Tensor:
        """The code that represents 0."""
        return torch.round(-self.low / self.scale) - self.lost

    @property
    def slope(self) -> Tensor:
        # Tensor by tensor: a number divided by a tensor is a reciprocal and a product in PyTorch, which rounds twice.
        return torch.full_like(self.low, self.steps) / (self.high - self.low)

    @property
    def shift(self) -> Tensor:
        """The zero code as float32 arithmetic finds it, sometimes 120.99999 for 121."""
        return (-self.low * torch.full_like(self.low, self.steps)) / (self.high - self.low)

    @property
    def first(self) -> float:
        """The byte that holds code 0."""
        return -128.0 if self.signed else 0.0

    @property
    def origin(self) -> float:
        """The number of code 0 at the moment of rounding."""
        return self.first if self.rounds_signed else 0.0

    @property
    def offset(self) -> Tensor:
        """The term added before rounding; for signed bytes in a kernel a term that is almost 0 is dropped."""
        offset = self.shift + self.origin
        return torch.where(offset.abs() < SHIFT_TOLERANCE, 0.0, offset) if self.rounds_signed else offset

    def in_kernel(self) -> "FakeQuantizeRange":
        """Return the same range for a quantizer that is a part of a layer's kernel."""
        return replace(self, rounds_signed=self.signed)

    @property
    def zero_byte(self) -> Tensor:
        """The byte that represents 0, unrounded, as float arithmetic on bytes subtracts it."""
        return torch.zeros_like(self.low) if self.signed else self.shift

    def is_left_out(self, source: "FakeQuantizeRange", unit: Tensor, term: float) -> bool:
        """Return True where the plugin leaves the quantizer out.

        It reads the integers of another quantizer, `source`, on a scale `unit` plus a number, and its limits are less
        than a byte away from theirs.
        """
        if self.steps != 255 or (self.signed, self.steps) != (source.signed, source.steps):
            return False
        limits = replace(self, low=self.low - term, high=self.high - term).moved(unit, source.zero_byte)
        away = torch.stack([limits.low - source.first, limits.high - source.first - self.steps]).abs()
        return bool((away <= self.steps / (self.steps + 1)).all())

    def codes(self, x: Tensor, from_layer: bool = False) -> Tensor:
        """Return codes 0 to `steps` of real values: a fused multiply-add, then rounding, then the clip.

        `from_layer`: the values come from a layer alone, whose kernel divides by a destination scale where there is
        no shift.
        """
        slope = self.slope
        offset = self.offset
        if from_layer and self.steps == 255 and not bool(offset):
            one = torch.ones_like(slope)
            slope = one / (one / slope)  # the kernel is given 1 / slope, and multiplies by its reciprocal
        # A fused multiply-add rounds once, at the end. The float64 product of two float32 numbers is exact, and the
        # rounding of the sum in float64 is too fine to matter.
        return self._rounded_codes((x.double() * slope.double() + offset.double()).float())

    def codes_by_channel(self, x: Tensor) -> Tensor:
        """Return codes where each channel has a range of its own: a product, then a sum.

        The term added is the same for all channels, unless their terms are far apart.
        """
        offset = self.offset
        first = offset.flatten()[0]
        if bool(((offset - first).abs() < SHIFT_TOLERANCE).all()):
            offset = first
        return self._rounded_codes(x * self.slope + offset)

    def codes_in_attention(self, x: Tensor) -> Tensor:
        """Return codes at the end of an attention that runs as a single operator: a product, then a sum."""
        offset = torch.zeros_like(self.low) if self.rounds_signed else -self.low * self.slope
        return self._rounded_codes(x * self.slope + offset)

    def _rounded_codes(self, x: Tensor) -> Tensor:
        return (torch.round(x) - self.origin).clamp(0, self.steps)


@dataclass(frozen=True)
class Codes(Simulated):
    """A tensor on a quantizer's grid: unsigned codes, as float32 numbers."""

    values: Tensor
    limits: FakeQuantizeRange
    unrounded: Tensor | None = None
    """The clipped values, where the file as users run it does not round them."""

    @property
    def bytes(self) -> Tensor:
        return self.values + self.limits.first

    def real(self) -> Tensor:
        return (self.values - self.limits.zero_code) * self.limits.scale

    def before_loss(self) -> Tensor:
        """Return the real values on the quantizer's own grid, whose zero point the plugin may lose behind it."""
        return self.real() - self.limits.lost * self.limits.scale

    def codes(self, limits: FakeQuantizeRange) -> Tensor:
        return self.scaled.codes(limits)

    @property
    def scaled(self) -> "Scaled":
        return Scaled(self.real(), self, self.limits.scale)


@dataclass(frozen=True)
class Scaled(Simulated):
    """Integers times a number, plus a number, which is integers on another scale with another zero."""

    values: Tensor
    integers: Codes
    unit: Tensor
    term: float = 0.0
    """The number that is added."""
    is_sum: bool = False
    """True where a number was added at all: several may cancel each other, but each was rounded."""

    def real(self) -> Tensor:
        return self.values

    def codes(self, limits: FakeQuantizeRange) -> Tensor:
        left_out = limits.is_left_out(self.integers.limits, self.unit, self.term)
        return self.integers.values if left_out else limits.codes(self.values)

    def times(self, factor: Tensor, values: Tensor) -> "Scaled":
        """Return these integers times a number, whose product is given."""
        return replace(self, values=values, unit=self.unit * factor, term=self.term * float(factor))

    def plus(self, number: float, values: Tensor) -> "Scaled":
        """Return these integers plus a number, whose sum is given."""
        return replace(self, values=values, term=self.term + number, is_sum=True)

    @property
    def is_without_zero_point(self) -> bool:
        """Bytes of 0 represent 0, and larger bytes larger numbers."""
        return bool(self.unit > 0) and not bool(self.integers.limits.zero_byte) and not self.term

    def clipped(self, bounds: tuple[float, float]) -> "Scaled":
        """Clip the bytes to those that lie between the bounds."""
        limits = self.integers.limits
        # The unit may be negative.
        first, second = (_byte_of(bound - self.term, self.unit, limits) for bound in bounds)
        low = torch.minimum(first, second).ceil()
        high = torch.maximum(first, second).floor()
        reals = [(byte - limits.zero_byte) * self.unit + self.term for byte in (low, high)]
        codes = Codes(self.integers.bytes.clamp(low, high) - limits.first, limits)
        return replace(self, values=self.values.clamp(torch.minimum(*reals), torch.maximum(*reals)), integers=codes)


def _byte_of(bound: float, unit: Tensor, limits: FakeQuantizeRange) -> Tensor:
    """Return the byte of a bound in these units, with a fraction where the bound lies between two."""
    # A number over a tensor is, in torch, the number times the reciprocal: 15 scales over the scale are 14.999999.
    return torch.full_like(unit, bound) / unit + limits.zero_byte


@dataclass(frozen=True)
class Average(Simulated):
    """Averages of the bytes of a tensor: of the integers, not of the real values that they represent."""

    values: Tensor
    limits: FakeQuantizeRange
    of_window: bool
    """True for a pool with a window, whose result the plugin takes for bytes where it clips them; a mean is float32."""
    factor: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    """A number that the averages are multiplied by; the plugin moves it into the quantizer unless it is negative."""
    term: float = 0.0
    """A number that is added, which the plugin moves there too."""

    @property
    def unit(self) -> Tensor:
        return self.limits.scale * self.factor

    @property
    def is_positive(self) -> bool:
        return bool(self.factor > 0)

    def real(self) -> Tensor:
        return (self.values - self.limits.zero_byte) * self.unit + self.term

    def codes(self, limits: FakeQuantizeRange) -> Tensor:
        """Return codes with the limits moved to the bytes: with the same scale before and after, ties stay ties.

        A negative factor is an operator of its own, which reads bytes.
        """
        if not self.is_positive:
            return limits.codes(self.rounded().real())
        limits = replace(limits, low=limits.low - self.term, high=limits.high - self.term)
        return limits.moved(self.unit, self.limits.zero_byte).codes(self.values)

    def times(self, factor: Tensor) -> "Average":
        """Return the averages times a number."""
        return replace(self, factor=self.factor * factor, term=self.term * float(factor))

    def plus(self, number: float) -> "Average":
        """Return the averages plus a number."""
        return replace(self, term=self.term + number)

    def rounded(self) -> "Average":
        """Return the averages as a kernel reads them that takes bytes."""
        return replace(self, values=torch.round(self.values))

    def clipped(self, bounds: tuple[float, float]) -> "Average":
        """Clip averages to the bounds, in bytes; where they count as bytes, to the bytes between the bounds."""
        first, second = (_byte_of(bound - self.term, self.unit, self.limits) for bound in bounds)
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        if self.of_window:
            low, high = low.ceil(), high.floor()
        return replace(self, values=self.values.clamp(low, high))


@dataclass(frozen=True)
class ScaledSum(Simulated):
    """A sum divided by a scale: the plugin takes it in units of an operand's scale."""

    values: Tensor
    unit: Tensor
    from_layer: bool = False
    """True where a layer's kernel computes the sum, and then its quantizer, unless a tensor between is an output."""
    in_kernel: Tensor | None = None
    """The values as the kernel of a convolution computes them, where the sum may stand in it or be an operator."""

    def real(self) -> Tensor:
        return self.values * self.unit

    def changed(self, function: Callable[[Tensor], Tensor]) -> "ScaledSum":
        """Return the sum behind a function of its values."""
        in_kernel = None if self.in_kernel is None else function(self.in_kernel)
        return replace(self, values=function(self.values), in_kernel=in_kernel)

    def codes(self, limits: FakeQuantizeRange) -> Tensor:
        return limits.moved(self.unit).codes(self.values)


@dataclass(frozen=True)
class Accumulator(Simulated):
    """The result of a layer without a bias: exact sums, and a scale that the plugin merges into the next operator.

    Without a bias nothing stands between the layer's scales and the limits of the quantizer, which it divides by them.
    """

    values: Tensor
    unit: Tensor
    """The scale of the sums: [], or a shape that broadcasts over the output channels."""
    scales: tuple[Tensor, Tensor] | None = None
    """The scales of both factors, if both are activations: the next scaling is merged into the second."""

    def real(self) -> Tensor:
        return self.values * self.unit

    def codes(self, limits: FakeQuantizeRange) -> Tensor:
        moved = limits.moved(self.unit)
        slope = moved.slope.flatten()
        # Scales that differ by channel make a range for each, with which the plugin rounds the product before it adds.
        if not bool((slope == slope[0]).all()):
            return moved.codes_by_channel(self.values)
        one = replace(limits, low=moved.low.flatten()[0], high=moved.high.flatten()[0])
        return one.codes(self.values, from_layer=True)


@dataclass(frozen=True)
class Shifted(Simulated):
    """The result of a linear layer on tokens whose outputs share a bias, which the plugin moves into the quantizer."""

    values: Tensor
    """Without the bias."""
    bias: Tensor

    def real(self) -> Tensor:
        return self.values + self.bias

    def codes(self, limits: FakeQuantizeRange) -> Tensor:
        moved = replace(limits, low=limits.low - self.bias, high=limits.high - self.bias)
        return moved.codes(self.values, from_layer=True)
