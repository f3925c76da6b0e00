"""What all observers do with a batch, and the observers that keep only its extremes."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.errors import CalibrationError
from halfeven.quantization.compile import fused
from halfeven.quantization.scheme import Scheme


class Observer(Protocol):
    """What calibration asks of a range estimator."""

    def update(self, values: Tensor) -> None:
        """See one batch, shape [channels or 1, ...]; raises CalibrationError on NaN or infinity."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The proposed (low, high), each of shape [channels or 1]; raises CalibrationError when nothing was seen."""


def rows(values: Tensor) -> Tensor:
    """Values [channels or 1, ...] as float32 numbers [channels or 1, elements], without their gradient."""
    return values.detach().float().reshape(values.shape[0], -1)


def finite_extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel, [channels], reduced over all processes.

    Args:
        values: [channels or 1, ...].

    Raises:
        CalibrationError: NaN or infinity.
    """
    low, high = fused(extremes)(rows(values))
    # An average or a plain minimum would differ from rank to rank; the union of what all ranks saw does not. A
    # reduction may lose NaN, never infinity: all ranks must raise, or one waits for the others for ever.
    low = -all_reduce(torch.where(torch.isfinite(low), -low, torch.inf), dist.ReduceOp.MAX)
    high = all_reduce(torch.where(torch.isfinite(high), high, torch.inf), dist.ReduceOp.MAX)
    if torch.compiler.is_compiling():  # looking at values would cut the compiled model in two; the loss is NaN soon
        return low, high
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise CalibrationError("a batch holds NaN or infinite values")
    return low, high


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row of [channels, elements]."""
    return values.amin(-1), values.amax(-1)


def all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """The reduction over all processes of a run; the values themselves in a run of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values, op=operation)
    return values


def seen(value: Tensor | None) -> Tensor:
    """The value; raises CalibrationError where no batch has set it."""
    if value is None:
        raise CalibrationError("no batch reached it during calibration")
    return value


class MinMaxObserver:
    """The extremes of everything seen: nothing is clipped."""

    def __init__(self, scheme: Scheme) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, values: Tensor) -> None:
        low, high = finite_extremes(values)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        return seen(self.low), seen(self.high)


class MovingAverageObserver:
    """Exponential moving average of the extremes of the batches; the first batch sets it."""

    def __init__(self, scheme: Scheme, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, values: Tensor) -> None:
        low, high = finite_extremes(values)
        self.low = low if self.low is None else torch.lerp(self.low, low, self.momentum)
        self.high = high if self.high is None else torch.lerp(self.high, high, self.momentum)

    def range(self) -> tuple[Tensor, Tensor]:
        return seen(self.low), seen(self.high)
