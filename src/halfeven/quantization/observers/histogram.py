"""The observer that keeps a histogram of all values seen, and the ranges that are chosen from it."""

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.quantization.arithmetic import scale_and_zero_point
from halfeven.quantization.compile import fused
from halfeven.quantization.observers.minmax import all_reduce, finite_extremes, rows, seen
from halfeven.quantization.observers.search import CANDIDATES, best_range, by_parts, least_error
from halfeven.quantization.scheme import Scheme

BINS = 4096
"""Number of bins in a histogram."""

SMALLEST_EXPONENT = -126
"""Smallest binary exponent of a bin's width: its reciprocal is a float32 number too."""

MAX_SEARCH_NUMBERS = 2**20
"""Largest number of bins, over all candidate ranges, in memory at a time: few enough for a processor's cache."""


LARGE_HISTOGRAMS = 3 * 2**18
"""Number of bins, over all rows, from which the search for a range is worth a kernel of its own."""


class HistogramObserver:
    """Keeps a histogram of all values seen, from which `select` chooses the range.

    The width of a bin is a power of two and its edges are multiples of the width, so that doubling the width merges
    pairs of bins exactly: the histogram does not depend on the order and size of the batches, nor on the process that
    saw them.

    Args:
        scheme: the grid.
        select: returns the range, (low, high), each [rows], for a histogram.
    """

    def __init__(self, scheme: Scheme, select: Callable[["HistogramObserver"], tuple[Tensor, Tensor]]) -> None:
        self.scheme = scheme
        self.select = select
        self.counts = torch.empty(0)
        self.first = torch.empty(0, dtype=torch.int64)  # the first bin starts at first * width, [rows]
        self.exponent = torch.empty(0, dtype=torch.int64)  # of the width, [rows]
        self.smallest = torch.empty(0)
        self.largest = torch.empty(0)

    def update(self, values: Tensor) -> None:
        """Count a batch, [channels or 1, ...]."""
        low, high = finite_extremes(values)
        # The bins have to cover the values seen before and the new ones.
        if self.counts.numel():
            low = torch.minimum(self.smallest, low)
            high = torch.maximum(self.largest, high)
        first, exponent = _narrowest_bins(low, high)
        if self.counts.numel():
            self._widen_bins(first, exponent)
        else:
            # In float64, which counts exactly up to 2^53: the batches of an activation pass float32's 2^24.
            self.counts = torch.zeros(len(low), BINS, dtype=torch.float64, device=low.device)
        self.first = first
        self.exponent = exponent
        self.smallest = low
        self.largest = high
        # Exact in float32: the factor is a power of two, and indices are below 2^24.
        bins = (torch.floor(rows(values) * _power_of_two(-exponent)[:, None]) - first[:, None]).long()
        # One `bincount` for all rows: row r counts in the bins from r * BINS on.
        bins += torch.arange(len(bins), device=bins.device)[:, None] * BINS
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen_bins(self, first: Tensor, exponent: Tensor) -> None:
        # Indices are below 2^25, so that a shift by 62 leaves 0 or -1 of all of them. The bins of a tensor of zeros may
        # widen by more, and a shift by 64 bits is not defined.
        old = self.first[:, None] + torch.arange(BINS, device=first.device)
        # Doubling the width k times takes bin i to floor(i / 2^k): an arithmetic shift, for negative i too.
        new = (old >> (exponent - self.exponent).clamp(max=62)[:, None]) - first[:, None]
        # Only empty bins fall outside of the new ones.
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, new.clamp(0, BINS - 1), self.counts)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the selected range, (low, high), each [channels or 1]."""
        if not self.counts.numel():
            seen(None)
        self.counts = all_reduce(self.counts, dist.ReduceOp.SUM)
        return self.select(self)

    @property
    def width(self) -> Tensor:
        """Width of a bin, [rows]."""
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


def _narrowest_bins(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first bin and the exponent of the width, [rows] each, of the narrowest bins for a range.

    They are no finer than float32.
    """
    largest = torch.maximum(-low, high)
    # `frexp` gives the smallest power of two above the quotient, so that BINS bins cover the extent.
    exponent = torch.where(high > low, torch.frexp((high - low) / BINS).exponent, SMALLEST_EXPONENT).long()
    finest = torch.where(largest > 0, torch.frexp(largest).exponent - 24, SMALLEST_EXPONENT).long()
    exponent = torch.maximum(exponent, finest).clamp(min=SMALLEST_EXPONENT)
    first = torch.floor(low * _power_of_two(-exponent))
    last = torch.floor(high * _power_of_two(-exponent))
    # Edges are multiples of the width: a range that begins in the middle of a bin may need a bin more than there are.
    exponent += last - first >= BINS
    return torch.floor(low * _power_of_two(-exponent)).long(), exponent


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent).float()


def percentile_range(histogram: HistogramObserver, percentile: float = 99.99) -> tuple[Tensor, Tensor]:
    """Return the range that leaves out (100 - percentile)/2 percent of the values at each end, [rows] each.

    Data of one sign keep their end at zero and lose (100 - percentile) percent at the other end.
    """
    cumulative = histogram.counts.cumsum(1)
    total = cumulative[:, -1:]
    tail = (100 - percentile) / 100
    two_sided = (histogram.smallest < 0) & (histogram.largest > 0)
    share = torch.where(two_sided, tail / 2, tail)[:, None]
    # `right=True` passes over the empty bins at the start, whose cumulative count is 0, when nothing is to be left out.
    first = torch.searchsorted(cumulative, share * total, right=True).clamp(max=BINS - 1)[:, 0]
    last = torch.searchsorted(cumulative, (1 - share) * total).clamp(max=BINS - 1)[:, 0]
    low = histogram.low + first * histogram.width
    # The right edge of the last bin, whose values all stay; but not beyond the values that were seen.
    high = histogram.low + (last + 1) * histogram.width
    return torch.maximum(low, histogram.smallest), torch.minimum(high, histogram.largest)


def mse_range(histogram: HistogramObserver, power: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return the range with the least sum of |x - fake_quantize(x)|^power over all values seen, [rows] each.

    White paper, section 3.1, equation 16. A higher power weighs the large errors of clipping more against the small
    errors of rounding.
    """
    # Rows and candidates take the place of channels: a single call computes all scales.
    scheme = dataclasses.replace(histogram.scheme, axis=0)
    centers, counts = _occupied_bins(histogram)

    # By the tensor's own size alone: the last bits of a sum depend on how it is computed, and must not depend on what
    # the process did before.
    compute = fused(_quantization_errors) if counts.numel() > LARGE_HISTOGRAMS else _quantization_errors

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = scale_and_zero_point(lows.flatten(), highs.flatten(), scheme)
        grids = scale.view(*lows.shape, 1), zero_point.view(*lows.shape, 1)  # [candidates, rows, 1]
        found: Tensor = compute(centers, counts, *grids, scheme.quant_min, scheme.quant_max, power)
        return found

    bounded = by_parts(errors, max(1, MAX_SEARCH_NUMBERS // counts.numel()))
    return least_error(bounded, histogram.smallest, histogram.largest, scheme.symmetric)


def _quantization_errors(
    x: Tensor, counts: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, power: float
) -> Tensor:
    """Return the sum of |x - fake_quantize(x)|^power over bins, [candidates, rows], in one pass over memory.

    Args:
        x, counts: values of the bins, and their number of occurrences, [rows, bins].
        scale, zero_point: those of the candidates, [candidates, rows, 1].
    """
    # In place: without a compiler each operation would otherwise write a tensor of its own.
    integers = (x / scale).round_().add_(zero_point).clamp_(low, high)
    distance = integers.sub_(zero_point).mul_(scale).sub_(x).abs_()
    return distance.pow_(power).double().mul_(counts).sum(-1)


def _occupied_bins(histogram: HistogramObserver) -> tuple[Tensor, Tensor]:
    """Return centers and counts of the bins that are not empty, [rows, most of a row]: a filter has few weights."""
    row, bin_ = (histogram.counts > 0).nonzero(as_tuple=True)
    each = torch.bincount(row, minlength=len(histogram.counts))
    # `nonzero` lists the bins row by row, so a bin's place in its row is its index less the number of bins in rows
    # before.
    place = torch.arange(len(row), device=row.device) - (each.cumsum(0) - each)[row]
    shape = len(each), int(each.amax())
    centers = histogram.width.new_zeros(shape)
    counts = histogram.counts.new_zeros(shape)
    centers[row, place] = histogram.low[row] + (bin_ + 0.5) * histogram.width[row]
    counts[row, place] = histogram.counts[row, bin_]
    return centers, counts


def entropy_range(histogram: HistogramObserver) -> tuple[Tensor, Tensor]:
    """Return the range whose quantized distribution has the least Kullback-Leibler divergence from the clipped one.

    Migacz, "8-bit inference with TensorRT" (GTC 2017): the clipped reference puts its tails into the outermost bins;
    the quantized distribution spreads the mass of each level of the grid evenly over the bins that are not empty.
    """
    scheme = dataclasses.replace(histogram.scheme, axis=0)

    def divergences(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = scale_and_zero_point(lows.flatten(), highs.flatten(), scheme)
        # The integer that the middle of each bin is quantized to, [candidates * rows, bins]; `inside` is False where it
        # is clipped.
        level = torch.round(histogram.centers.repeat(len(lows), 1) / scale[:, None]) + zero_point[:, None]
        inside = (level >= scheme.quant_min) & (level <= scheme.quant_max)
        level = level.clamp_(scheme.quant_min, scheme.quant_max).long() - scheme.quant_min
        return _divergence(histogram.counts.repeat(len(lows), 1), level, inside, scheme.levels).view_as(lows)

    # Both ends shrink together, as in Migacz's search over one threshold.
    fractions = torch.linspace(1.0, 0.1, CANDIDATES, device=histogram.smallest.device)[:, None]
    bounded = by_parts(divergences, max(1, MAX_SEARCH_NUMBERS // histogram.counts.numel()))
    return best_range(bounded, histogram.smallest * fractions, histogram.largest * fractions)


def _divergence(counts: Tensor, level: Tensor, inside: Tensor, levels: int) -> Tensor:
    """Return the Kullback-Leibler divergence of each row, [rows], in nats; infinite where no bin is inside.

    Args:
        counts: the histograms, [rows, bins].
        level: index of the grid's integer that each bin is quantized to, [rows, bins].
        inside: True for the bins within the range, [rows, bins].
        levels: number of integers of the grid.
    """
    first = inside.int().argmax(1, keepdim=True)
    last = counts.shape[1] - 1 - inside.flip(1).int().argmax(1, keepdim=True)
    position = torch.arange(counts.shape[1], device=counts.device)
    # The reference distribution P: the values outside of the range are clipped into the outermost bins inside.
    reference = torch.where(inside, counts, 0.0)
    reference.scatter_add_(1, first, torch.where(position < first, counts, 0.0).sum(1, keepdim=True))
    reference.scatter_add_(1, last, torch.where(position > last, counts, 0.0).sum(1, keepdim=True))
    # The quantized distribution Q: the mass of a level, shared by its bins that are not empty.
    occupied = (inside & (counts > 0)).to(counts.dtype)
    empty = torch.zeros(len(counts), levels, dtype=counts.dtype, device=counts.device)
    mass = empty.scatter_add(1, level, occupied * counts)
    bins = empty.scatter_add(1, level, occupied)
    quantized = occupied * mass.gather(1, level) / bins.gather(1, level).clamp(min=1)
    p = reference / reference.sum(1, keepdim=True)
    # A bin that clipping alone has filled has no mass in Q: a small floor keeps its contribution finite.
    q = (quantized / quantized.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-12)
    return torch.where(inside.any(1), (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1), torch.inf)
