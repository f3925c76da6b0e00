"""The protocol of observers, what they share, and the observers that keep the extremes of batches."""

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.errors import CalibrationError
from halfeven.quantization.compile import fused_once_worthwhile
from halfeven.quantization.scheme import Scheme


class Observer(Protocol):
    """A range estimator, as calibration uses it."""

    def update(self, values: Tensor) -> None:
        """See a batch, [channels or 1, ...].

        Raises:
            CalibrationError: the batch has NaN or infinite values.
        """

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the proposed range, (low, high), each [channels or 1].

        Raises:
            CalibrationError: no batch was seen.
        """


def rows(values: Tensor) -> Tensor:
    """Return values [channels or 1, ...] as float32 [channels or 1, elements], without their gradient."""
    return values.detach().float().reshape(values.shape[0], -1)


def finite_extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each channel, [channels or 1], over all processes.

    Args:
        values: [channels or 1, ...].

    Raises:
        CalibrationError: a value is NaN or infinite.
    """
    low, high = largest_of_processes(*batch_extremes(values))
    if not torch.compiler.is_compiling():  # reading values would break the compiled graph; NaN shows in the loss
        check_finite(low, high)
    return low, high


def batch_extremes(values: Tensor, bounds: tuple[float, float] = (-math.inf, math.inf)) -> tuple[Tensor, Tensor]:
    """Return the extremes of the clipped values of each channel, [channels or 1].

    Args:
        values: [channels or 1, ...].
        bounds: to which all values are clipped. A clip keeps the order, so the extremes are clipped instead.
    """
    low, high = fused_once_worthwhile(extremes, values)(rows(values))
    return low.clamp(*bounds), high.clamp(*bounds)


def largest_of_processes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranges that hold those of all processes, shaped like `low`; infinite where one is NaN or infinite."""
    # The lower ends are negated, so that a single reduction to the largest serves both.
    ends = torch.stack((-low, high))
    # A reduction may drop NaN but never infinity: all processes must raise together, or one waits for the others for
    # ever.
    low, high = all_reduce(torch.where(torch.isfinite(ends), ends, torch.inf), dist.ReduceOp.MAX).unbind()
    return -low, high


def check_finite(low: Tensor, high: Tensor) -> None:
    """Raise CalibrationError where an extreme of a batch is not finite; wait for the device that computes it."""
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise CalibrationError("a batch holds NaN or infinite values")


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each row of [channels, elements], each [channels]."""
    return values.amin(-1), values.amax(-1)


def all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """Return the reduction of a tensor over all processes of a run; the tensor itself in a run of one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values, op=operation)
    return values


def seen(value: Tensor | None) -> Tensor:
    """Return the value, or raise CalibrationError where it is None: no batch has set it."""
    if value is None:
        raise CalibrationError("no batch reached it during calibration")
    return value


class MinMaxObserver:
    """Proposes the extremes of all values seen: nothing is clipped."""

    def __init__(self, scheme: Scheme) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """See a batch, [channels or 1, ...]."""
        low, high = finite_extremes(values)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the proposed range, (low, high), each [channels or 1]."""
        return seen(self.low), seen(self.high)


class MovingAverageObserver:
    """Proposes the exponential moving average of the extremes of the batches; the first batch sets it."""

    def __init__(self, scheme: Scheme, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """See a batch, [channels or 1, ...]."""
        low, high = finite_extremes(values)
        self.low = low if self.low is None else torch.lerp(self.low, low, self.momentum)
        self.high = high if self.high is None else torch.lerp(self.high, high, self.momentum)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the proposed range, (low, high), each [channels or 1]."""
        return seen(self.low), seen(self.high)
