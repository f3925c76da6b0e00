"""Observers see the batches of a tensor and propose its range (white paper, section 3.1).

An observer works on rows: [1, elements] for a tensor with one scale, [channels, elements] for one scale per channel.
All statistics accumulate over all batches; the range is chosen once, at the end.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.arithmetic import dequantize, quantize, scale_and_zero_point
from halfeven.errors import CalibrationError, ConfigError
from halfeven.scheme import Scheme

BINS = 4096
CANDIDATES = 100

SMALLEST_EXPONENT = -126
"""Of the width of a bin: its reciprocal is a float32 number too."""

AT_ONCE = 2**21
"""Numbers that a search over candidate ranges holds at a time."""


class Observer(Protocol):
    """What calibration asks of a range estimator."""

    def update(self, rows: Tensor) -> None:
        """See one batch, shape [channels or 1, elements]; raises CalibrationError on NaN or infinity."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The proposed (low, high), each of shape [channels or 1]; raises CalibrationError when nothing was seen."""


def finite_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, reduced over all processes; raises CalibrationError on NaN or
    infinity."""
    low, high = rows.detach().float().aminmax(dim=-1)
    # An average or a plain minimum would differ from rank to rank; the union of what all ranks saw does not. A
    # reduction may lose NaN, never infinity: all ranks must raise, or one waits for the others for ever.
    low = -all_reduce(torch.where(torch.isfinite(low), -low, torch.inf), dist.ReduceOp.MAX)
    high = all_reduce(torch.where(torch.isfinite(high), high, torch.inf), dist.ReduceOp.MAX)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise CalibrationError("a batch holds NaN or infinite values")
    return low, high


def all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """The reduction over all processes of a run; the values themselves in a run of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values, op=operation)
    return values


class MinMaxObserver:
    """The extremes of everything seen: nothing is clipped."""

    def __init__(self, scheme: Scheme) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        low, high = finite_extremes(rows)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        return _seen(self.low), _seen(self.high)


class MovingAverageObserver:
    """Exponential moving average of the extremes of the batches; the first batch sets it."""

    def __init__(self, scheme: Scheme, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        low, high = finite_extremes(rows)
        self.low = low if self.low is None else torch.lerp(self.low, low, self.momentum)
        self.high = high if self.high is None else torch.lerp(self.high, high, self.momentum)

    def range(self) -> tuple[Tensor, Tensor]:
        return _seen(self.low), _seen(self.high)


class HistogramObserver:
    """A histogram of everything seen, from which `select` chooses the range.

    Bins are a power of two wide and their edges are multiples of it, so that doubling the width merges pairs of bins
    exactly: the histogram is that of all values at once, whatever the order and size of the batches and the process
    that saw them.
    """

    def __init__(self, scheme: Scheme, select: Callable[["HistogramObserver"], tuple[Tensor, Tensor]]) -> None:
        self.scheme = scheme
        self.select = select
        self.counts = torch.empty(0)
        self.first = torch.empty(0, dtype=torch.int64)  # the first bin starts at first * width, [rows]
        self.exponent = torch.empty(0, dtype=torch.int64)  # of the width, [rows]
        self.smallest = torch.empty(0)
        self.largest = torch.empty(0)

    def update(self, rows: Tensor) -> None:
        rows = rows.detach().float()
        low, high = finite_extremes(rows)
        if self.counts.numel():
            low, high = torch.minimum(self.smallest, low), torch.maximum(self.largest, high)
        first, exponent = _bins(low, high)
        if self.counts.numel():
            self._widen(first, exponent)
        else:
            self.counts = torch.zeros(rows.shape[0], BINS, dtype=torch.float64, device=rows.device)
        self.first, self.exponent, self.smallest, self.largest = first, exponent, low, high
        # A power of two and indices below 2^24: exact in float32.
        bins = (torch.floor(rows * _power_of_two(-exponent)[:, None]) - first[:, None]).long()
        bins += torch.arange(rows.shape[0], device=rows.device)[:, None] * BINS
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, first: Tensor, exponent: Tensor) -> None:
        old = self.first[:, None] + torch.arange(BINS, device=first.device)
        new = (old >> (exponent - self.exponent).clamp(max=62)[:, None]) - first[:, None]
        # Only bins that were empty fall outside of the new ones.
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, new.clamp(0, BINS - 1), self.counts)

    def range(self) -> tuple[Tensor, Tensor]:
        if not self.counts.numel():
            _seen(None)
        self.counts = all_reduce(self.counts, dist.ReduceOp.SUM)
        return self.select(self)

    @property
    def width(self) -> Tensor:
        """Of a bin, [rows]."""
        return _power_of_two(self.exponent)

    @property
    def low(self) -> Tensor:
        """Left edge of the first bin, [rows]."""
        return self.first * self.width

    @property
    def centers(self) -> Tensor:
        """Middles of the bins, [rows, bins]."""
        steps = torch.arange(BINS, device=self.width.device) + 0.5
        return self.low[:, None] + steps * self.width[:, None]


def _bins(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """First bin, and exponent of the width, of the narrowest bins that hold a range; not finer than float32."""
    largest = torch.maximum(-low, high)
    exponent = torch.where(high > low, torch.frexp((high - low) / BINS).exponent, SMALLEST_EXPONENT).long()
    finest = torch.where(largest > 0, torch.frexp(largest).exponent - 24, SMALLEST_EXPONENT).long()
    exponent = torch.maximum(exponent, finest).clamp(min=SMALLEST_EXPONENT)
    first, last = (torch.floor(end * _power_of_two(-exponent)) for end in (low, high))
    exponent += last - first >= BINS
    return torch.floor(low * _power_of_two(-exponent)).long(), exponent


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent).float()


def percentile_range(histogram: HistogramObserver, percentile: float = 99.99) -> tuple[Tensor, Tensor]:
    """The range that leaves out (100 - percentile)/2 percent of the values at each end of two-sided data.

    One-sided data (no negative, or no positive value) keeps its end at zero and gives up all at the other.
    """
    cumulative = histogram.counts.cumsum(1)
    total = cumulative[:, -1:]
    tail = (100 - percentile) / 100
    two_sided = (histogram.smallest < 0) & (histogram.largest > 0)
    share = torch.where(two_sided, tail / 2, tail)[:, None]
    first = torch.searchsorted(cumulative, share * total, right=True).clamp(max=BINS - 1)[:, 0]
    last = torch.searchsorted(cumulative, (1 - share) * total).clamp(max=BINS - 1)[:, 0]
    low = histogram.low + first * histogram.width
    high = histogram.low + (last + 1) * histogram.width
    return torch.maximum(low, histogram.smallest), torch.minimum(high, histogram.largest)


def mse_range(histogram: HistogramObserver, power: float = 2.0) -> tuple[Tensor, Tensor]:
    """The range with the least error sum |x - fake_quantize(x)|^power over all values seen (white paper, equation 16).

    For one-sided and symmetric grids a search over the extent; else the extents of both ends are searched in turn.
    """
    scheme, low, high = histogram.scheme, histogram.smallest, histogram.largest
    centers, counts = histogram.centers, histogram.counts
    rows = dataclasses.replace(scheme, axis=0)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = scale_and_zero_point(lows.flatten(), highs.flatten(), rows)
        x = centers.repeat(len(lows), 1)
        distance = (dequantize(quantize(x, scale, zero_point, rows), scale, zero_point, rows) - x).abs_()
        return (distance.pow_(power).view(len(lows), *counts.shape).double() * counts).sum(-1)

    fractions = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES, device=low.device)[:, None]
    # Factors from 1/2 to 3/2, the present value first so that it wins a tie.
    around = torch.cat([torch.ones_like(fractions[:1]), 0.5 + fractions])
    low, high = _best(errors, low * fractions, high * fractions)
    if not scheme.symmetric:
        for _ in range(2):  # the optimum of one end moves little with the other: two turns settle it
            low, high = _best(errors, low * around, high.expand(len(around), -1))
            low, high = _best(errors, low.expand(len(around), -1), high * around)
    return low, high


def _best(errors: Callable[[Tensor, Tensor], Tensor], lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate with the least error, of [candidates, rows], chosen row by row; the first wins a tie."""
    size = max(1, AT_ONCE // (BINS * lows.shape[1]))
    found = [errors(low, high) for low, high in zip(torch.split(lows, size), torch.split(highs, size), strict=True)]
    best = torch.cat(found).argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def entropy_range(histogram: HistogramObserver) -> tuple[Tensor, Tensor]:
    """The range whose quantized distribution has the least Kullback-Leibler divergence from the clipped one seen.

    The clipped reference puts its tails into the outermost bins; the quantized distribution spreads the mass of each of
    the grid's levels evenly over the bins that were not empty (Migacz, "8-bit inference with TensorRT", GTC 2017).
    """
    scheme = dataclasses.replace(histogram.scheme, axis=0)

    def divergences(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = scale_and_zero_point(lows.flatten(), highs.flatten(), scheme)
        level = torch.round(histogram.centers.repeat(len(lows), 1) / scale[:, None]) + zero_point[:, None]
        inside = (level >= scheme.quant_min) & (level <= scheme.quant_max)
        level = level.clamp_(scheme.quant_min, scheme.quant_max).long() - scheme.quant_min
        return _divergence(histogram.counts.repeat(len(lows), 1), level, inside, scheme.levels).view_as(lows)

    fractions = torch.linspace(1.0, 0.1, CANDIDATES, device=histogram.smallest.device)[:, None]
    return _best(divergences, histogram.smallest * fractions, histogram.largest * fractions)


def _divergence(counts: Tensor, level: Tensor, inside: Tensor, levels: int) -> Tensor:
    """Kullback-Leibler divergence of each row, [rows]; infinite where no bin is inside."""
    first = inside.int().argmax(1, keepdim=True)
    last = counts.shape[1] - 1 - inside.flip(1).int().argmax(1, keepdim=True)
    position = torch.arange(counts.shape[1], device=counts.device)
    reference = torch.where(inside, counts, 0.0)
    reference.scatter_add_(1, first, torch.where(position < first, counts, 0.0).sum(1, keepdim=True))
    reference.scatter_add_(1, last, torch.where(position > last, counts, 0.0).sum(1, keepdim=True))
    occupied = (inside & (counts > 0)).to(counts.dtype)
    empty = torch.zeros(len(counts), levels, dtype=counts.dtype, device=counts.device)
    mass = empty.scatter_add(1, level, occupied * counts)
    bins = empty.scatter_add(1, level, occupied)
    quantized = occupied * mass.gather(1, level) / bins.gather(1, level).clamp(min=1)
    p = reference / reference.sum(1, keepdim=True)
    # A bin that only clipping filled has no mass in the quantized distribution: a small floor keeps its price finite.
    q = (quantized / quantized.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-12)
    return torch.where(inside.any(1), (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1), torch.inf)


def _seen(value: Tensor | None) -> Tensor:
    if value is None:
        raise CalibrationError("no batch reached it during calibration")
    return value


OBSERVERS: dict[str, Callable[[Scheme], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": lambda scheme: HistogramObserver(scheme, percentile_range),
    "mse": lambda scheme: HistogramObserver(scheme, mse_range),
    "entropy": lambda scheme: HistogramObserver(scheme, entropy_range),
}
"""Range estimators by their names in options."""


def make_observer(name: str, scheme: Scheme) -> Observer:
    """An observer by its name; raises ConfigError for a name that does not exist."""
    if name not in OBSERVERS:
        raise ConfigError(f'There is no observer "{name}". Choose one of {", ".join(OBSERVERS)}.')
    return OBSERVERS[name](scheme)
