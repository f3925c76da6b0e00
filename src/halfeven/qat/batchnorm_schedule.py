"""The moments at which BatchNorm's statistics and observed ranges stop moving while quantization is learned.

Freezing: white paper, section 5.2 (arXiv:2106.08295). Statistics are re-estimated by `halfeven.layerwise.re_estimate`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.layerwise.batchnorm_statistics import average_batchnorm, batchnorms
from halfeven.options import Auto, Options, PositiveInt, Share, formerly
from halfeven.quantization.model_quantizers import quantizers, set_observing
from halfeven.renamed import renamed_attributes


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Options):
    """The moments at which ranges and BatchNorm statistics stop moving, in shares of the run."""

    freeze_batchnorm_after: Annotated[Share | Auto, formerly(None)] = "auto"
    """Share of the steps in which BatchNorm follows the batches; 0: frozen from the start, 1: never frozen. "auto": two
    thirds, and never where a scheme has less than 8 bits, whose statistics are re-estimated."""
    stop_observing_after: Share = 2 / 3
    """Share of the steps in which observed ranges follow the batches; 0: as calibrated, 1: to the end."""
    re_estimate: Annotated[bool | Auto, formerly(None)] = "auto"
    """Re-estimate BatchNorm before each validation; "auto": where a scheme has less than 8 bits and
    BatchNorm is not frozen: weights that were trained with frozen statistics suit these alone."""
    re_estimate_batches: PositiveInt = 50
    """Batches of calibration samples in a re-estimation."""


@checked_arguments(AlgorithmError)
def freeze_batchnorms(model: nn.Module) -> None:
    """Freeze BatchNorm: use its running statistics and keep them, until the next call of `train()`.

    Scale and shift are still trained. In a distributed run every process must call this function: the statistics are
    averaged over the processes first.
    """
    # The trainer's `model.train()` at the start of each epoch puts BatchNorm into training mode again, so this is
    # called before each step and usually finds nothing to do.
    live = [module for module in batchnorms(model).values() if module.training]
    if live:
        average_batchnorm(model)
    for module in live:
        module.eval()


def schedule(options: ScheduleOptions) -> Callable[[nn.Module, float], None]:
    """Return a function that stops ranges and BatchNorm statistics when they are due.

    Call it before each training step with the model and the fraction of the run that is done.
    """
    observing: dict[str, bool] = {}
    batchnorm: dict[str, float] = {}

    def before_step(model: nn.Module, done: float) -> None:
        wanted = done < options.stop_observing_after
        # Only changes are written: to fill the quantizers' flags on a device in each step would take time.
        if observing.get("now") != wanted:
            set_observing(model, wanted)
            observing["now"] = wanted
        if done >= batchnorm.setdefault("until", frozen_after(model, options)):
            freeze_batchnorms(model)

    return before_step


def frozen_after(model: nn.Module, options: ScheduleOptions) -> float:
    """Return the fraction of the run after which BatchNorm is frozen: that of the options, or one by the bits."""
    if options.freeze_batchnorm_after != "auto":
        return options.freeze_batchnorm_after
    # White paper, section 5.2, freezes late in the run. Below 8 bits weights hop between integers, and statistics
    # frozen at one moment suit none of the networks after it.
    return 1.0 if any(quantizer.scheme.bits < 8 for quantizer in quantizers(model).values()) else 2 / 3


__getattr__ = renamed_attributes(
    __name__,
    freeze="qat.batchnorm_schedule.freeze_batchnorms",
    re_estimate="layerwise.re_estimate.re_estimate",
)
