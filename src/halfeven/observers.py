"""Observers see the batches of a tensor and propose its range (white paper, section 3.1).

An observer works on rows: [1, elements] for a tensor with one scale, [channels, elements] for one scale per channel.
All statistics accumulate over all batches; the range is chosen once, at the end.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.arithmetic import fake_quantize, scale_and_zero_point
from halfeven.errors import CalibrationError, ConfigError
from halfeven.scheme import Scheme

BINS = 2048
CANDIDATES = 100


class Observer(Protocol):
    """What calibration asks of a range estimator."""

    def update(self, rows: Tensor) -> None:
        """See one batch, shape [channels or 1, elements]; raises CalibrationError on NaN or infinity."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The proposed (low, high), each of shape [channels or 1]; raises CalibrationError when nothing was seen."""


def finite_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, reduced over all processes; raises CalibrationError on NaN or "
    "infinity."""
    low, high = rows.detach().float().aminmax(dim=-1)
    # An average or a plain minimum would differ from rank to rank; the union of what all ranks saw does not.
    low = -all_reduce(-low, dist.ReduceOp.MAX)
    high = all_reduce(high, dist.ReduceOp.MAX)
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

    The bins double their width when a batch leaves them, which merges pairs of bins exactly, so that the result does
    not depend on the order of equal batches and every batch counts the same.
    """

    def __init__(self, scheme: Scheme, select: Callable[["HistogramObserver"], tuple[Tensor, Tensor]]) -> None:
        self.scheme = scheme
        self.select = select
        self.counts = torch.empty(0)
        self.low = torch.empty(0)  # left edge of the first bin, [rows]
        self.width = torch.empty(0)  # of a bin, [rows]
        self.smallest = torch.empty(0)
        self.largest = torch.empty(0)

    def update(self, rows: Tensor) -> None:
        rows = rows.detach().float()
        low, high = finite_extremes(rows)
        if not self.counts.numel():
            self.counts = torch.zeros(rows.shape[0], BINS, dtype=torch.float64, device=rows.device)
            # A constant tensor still needs a bin width: any positive one does.
            self.low, self.width = low, ((high - low) / BINS).clamp(min=torch.finfo(torch.float32).tiny * BINS)
            self.smallest, self.largest = low, high
        else:
            self.smallest, self.largest = torch.minimum(self.smallest, low), torch.maximum(self.largest, high)
            self._widen(low, high)
        bins = ((rows - self.low[:, None]) / self.width[:, None]).long().clamp(0, BINS - 1)
        bins += torch.arange(rows.shape[0], device=rows.device)[:, None] * BINS
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        while bool((too_low := low < self.low).any() | (too_high := high > self.low + BINS * self.width).any()):
            for row in torch.nonzero(too_low | too_high).flatten().tolist():
                merged = self.counts[row].view(BINS // 2, 2).sum(1)
                self.counts[row] = 0
                start = BINS // 2 if too_low[row] else 0  # grow to the left or to the right
                self.counts[row, start : start + BINS // 2] = merged
                self.low[row] -= BINS * self.width[row] * bool(too_low[row])
                self.width[row] *= 2

    def range(self) -> tuple[Tensor, Tensor]:
        if not self.counts.numel():
            _seen(None)
        self.counts = all_reduce(self.counts, dist.ReduceOp.SUM)
        return self.select(self)

    @property
    def centers(self) -> Tensor:
        """Middles of the bins, [rows, bins]."""
        steps = torch.arange(BINS, device=self.width.device) + 0.5
        return self.low[:, None] + steps * self.width[:, None]


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
    rows = Scheme(bits=scheme.bits, signed=scheme.signed, symmetric=scheme.symmetric, narrow=scheme.narrow, axis=0)

    def error(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = scale_and_zero_point(low, high, rows)
        distance = (fake_quantize(centers, scale, zero_point, rows) - centers).abs()
        return (distance.pow(power).double() * counts).sum(1)

    fractions = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES).tolist()
    low, high = _best(error, [(low * f, high * f) for f in fractions])
    if not scheme.symmetric:
        for _ in range(2):  # the optimum of one end moves little with the other: two turns settle it
            low, high = _best(error, [(low * f, high) for f in _around(fractions)])
            low, high = _best(error, [(low, high * f) for f in _around(fractions)])
    return low, high


def _around(fractions: list[float]) -> list[float]:
    """Factors from 1/2 to 3/2, the present value first so that it wins a tie."""
    return [1.0] + [0.5 + f for f in fractions]


def _best(error: Callable[[Tensor, Tensor], Tensor], candidates: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The candidate with the least error, chosen row by row; the first wins a tie."""
    best_low, best_high = candidates[0]
    least = error(best_low, best_high)
    for low, high in candidates[1:]:
        now = error(low, high)
        better = now < least
        least = torch.where(better, now, least)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high


def entropy_range(histogram: HistogramObserver) -> tuple[Tensor, Tensor]:
    """The range whose quantized distribution has the least Kullback-Leibler divergence from the clipped one seen.

    The clipped reference puts its tails into the outermost bins; the quantized distribution spreads the mass of each
    of the grid's levels evenly over the bins that were not empty (Migacz, "8-bit inference with TensorRT", GTC 2017).
    """
    lows, highs = [], []
    for row in range(histogram.counts.shape[0]):
        low, high = _entropy_of_row(
            histogram.counts[row],
            histogram.centers[row],
            float(histogram.smallest[row]),
            float(histogram.largest[row]),
            histogram.scheme,
        )
        lows.append(low)
        highs.append(high)
    device = histogram.counts.device
    return torch.tensor(lows, device=device), torch.tensor(highs, device=device)


def _entropy_of_row(counts: Tensor, centers: Tensor, low: float, high: float, scheme: Scheme) -> tuple[float, float]:
    best, least = (low, high), float("inf")
    for fraction in torch.linspace(1.0, 0.1, CANDIDATES).tolist():
        edges = torch.tensor([low * fraction]), torch.tensor([high * fraction])
        scale, zero_point = scale_and_zero_point(*edges, scheme)
        level = torch.round(centers.cpu() / scale) + zero_point
        inside = (level >= scheme.quant_min) & (level <= scheme.quant_max)
        level = level.clamp(scheme.quant_min, scheme.quant_max).long() - scheme.quant_min
        divergence = _divergence(counts.cpu(), level, inside, scheme.levels)
        if divergence < least:
            best, least = (low * fraction, high * fraction), divergence
    return best


def _divergence(counts: Tensor, level: Tensor, inside: Tensor, levels: int) -> float:
    if not bool(inside.any()):
        return float("inf")
    position = torch.nonzero(inside).flatten()
    reference = torch.where(inside, counts, 0.0)
    reference[position[0]] += counts[: position[0]].sum()
    reference[position[-1]] += counts[position[-1] + 1 :].sum()
    occupied = inside & (counts > 0)
    mass = torch.zeros(levels, dtype=counts.dtype).index_add_(0, level[inside], counts[inside])
    bins = torch.zeros(levels, dtype=counts.dtype).index_add_(0, level[occupied], occupied[occupied].to(counts.dtype))
    quantized = torch.where(occupied, mass[level] / bins[level].clamp(min=1), 0.0)
    p, q = reference / reference.sum(), quantized / quantized.sum().clamp(min=1)
    present = p > 0
    # A bin that only clipping filled has no mass in the quantized distribution: a small floor keeps its price finite.
    return float((p[present] * (p[present] / q[present].clamp(min=1e-12)).log()).sum())


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
