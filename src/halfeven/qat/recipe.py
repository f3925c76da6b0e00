"""The recipe of quantization-aware training: methods chosen by the bits, and printed with reasons before they act.

White paper, figure 11, and later methods. `docs/measurements/qat.md` has the measurements.
"""

from dataclasses import dataclass

from torch import nn

from halfeven.decision import Decision, decision_of_switch, table
from halfeven.errors import ConfigError
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan
from halfeven.qat.batchnorm_schedule import ScheduleOptions, frozen_after
from halfeven.qat.options import QATOptions
from halfeven.quantization.model_quantizers import quantizers
from halfeven.renamed import renamed_attributes

LOW_BITS = 4
"""Largest number of bits at which rounding takes a network far from its float model."""


@dataclass(frozen=True)
class QATRecipe:
    """The decisions, in the order in which they act."""

    equalize: Decision
    reconstruct: Decision
    blocks: bool
    """True where the rounding of whole blocks is learned, False where that of single layers is."""
    progress: Decision
    distill: Decision
    dampen: Decision
    freeze: Decision
    average: Decision
    re_estimate: Decision
    ranges: Decision
    """Learned ranges, from the plan: they were decided before the recipe."""

    def __str__(self) -> str:
        rows = {
            "cross-layer equalization": self.equalize,
            "learned rounding to start from": self.reconstruct,
            "progressive bit-width": self.progress,
            "distillation": self.distill,
            "dampened oscillations": self.dampen,
            "frozen oscillations": self.freeze,
            "average of the weights": self.average,
            "BatchNorm re-estimated": self.re_estimate,
            "learned ranges": self.ranges,
        }
        return table("Steps of quantization-aware training:", rows)


def decide(qmodel: nn.Module, options: QATOptions, schedule: ScheduleOptions) -> QATRecipe:
    """Choose the methods for the training of a prepared model.

    Args:
        qmodel: a model from `prepare`.
        options: methods that the user has switched on or off.
        schedule: when BatchNorm is frozen, and whether its statistics are re-estimated.

    Raises:
        ConfigError: `options.equalize` is "on" and BatchNorm is not folded.
    """
    found = quantizers(qmodel).values()
    # The fewest bits decide, since they make the largest steps.
    weight_bits = min((q.scheme.bits for q in found if q.weight), default=8)
    bits = min((q.scheme.bits for q in found), default=8)
    # Before the start of training, which depends on it: progressive bits leave no rounding to learn.
    progress = _decide_progress(options, bits)
    return QATRecipe(
        equalize=_decide_equalize(options, plan_of(qmodel)),
        reconstruct=_decide_start(options, bits, progress),
        blocks=options.start != "layers",
        progress=progress,
        distill=_off_unless_asked(options.distill, "a teacher that is no better than the student holds it back"),
        dampen=_followed(
            _off_unless_asked(options.dampen_oscillations, "freezing them costs less"), options, weight_bits
        ),
        freeze=_decide_freeze(options, weight_bits),
        average=_decide_average(options, bits),
        re_estimate=_decide_re_estimate(qmodel, schedule, bits),
        ranges=_decide_ranges(qmodel, bits),
    )


def _decide_ranges(qmodel: nn.Module, bits: int) -> Decision:
    learned = any(quantizer.learned for quantizer in quantizers(qmodel).values())
    if plan_of(qmodel).options.ranges != "auto":
        return Decision(learned, "as the options say")
    if learned:
        return Decision(True, f"at {bits} bits the loss finds better scales than observers do")
    return Decision(False, f"at {bits} bits ranges that follow the data train as well, and cost less")


def _off_unless_asked(value: str, reason: str) -> Decision:
    return decision_of_switch(value) or Decision(False, reason)


def check_equalize(options: QATOptions, batchnorm: str) -> None:
    """Check that the user's equalization can take place.

    Raises:
        ConfigError: `options.equalize` is "on" and BatchNorm is not folded.
    """
    if options.equalize == "on" and batchnorm != "fold":
        raise ConfigError(
            f'qat.equalize="on" scales channels of consecutive layers, and with quantization.batchnorm="{batchnorm}" a '
            'BatchNorm between them would undo it. Set quantization.batchnorm="fold", or leave qat.equalize at "auto".'
        )


def _decide_equalize(options: QATOptions, plan: Plan) -> Decision:
    check_equalize(options, plan.options.batchnorm)
    if chosen := decision_of_switch(options.equalize):
        return chosen
    if plan.per_channel:
        return Decision(False, "each weight channel has a scale of its own")
    if plan.options.batchnorm != "fold":
        return Decision(False, "a BatchNorm between the layers would undo it")
    return Decision(True, "one scale serves all channels of a weight, so they need equal ranges")


def _decide_start(options: QATOptions, bits: int, progress: Decision) -> Decision:
    if progress.enabled:
        return Decision(False, "a rounding that is learned for the last bits means nothing for the first")
    if options.start != "auto":
        return Decision(options.start != "ranges", "as the options say")
    if bits < LOW_BITS:
        return Decision(True, f"at {bits} bits calibrated ranges alone leave little to start from")
    return Decision(False, f"from {bits} bits calibrated ranges are as good a start, or better")


def _decide_progress(options: QATOptions, bits: int) -> Decision:
    reason = "learned rounding is a better start" if bits < LOW_BITS else f"{bits} bits can start directly"
    chosen = _off_unless_asked(options.progress, reason)
    if chosen.enabled and bits >= max(options.progression.bits):
        return Decision(True, f"{chosen.reason}, in vain: no tensor has fewer bits than the stages")
    return chosen


def _decide_freeze(options: QATOptions, weight_bits: int) -> Decision:
    if chosen := decision_of_switch(options.freeze_oscillations):
        return _followed(chosen, options, weight_bits)
    if weight_bits <= options.oscillation.bits:
        return Decision(False, "it pays only in long runs of depthwise networks")
    return Decision(False, f"weights of {weight_bits} bits switch by too little to matter")


def _followed(chosen: Decision, options: QATOptions, weight_bits: int) -> Decision:
    """Return a decision about oscillations, which says so where no weight is followed."""
    if chosen.enabled and weight_bits > options.oscillation.bits:
        most = options.oscillation.bits
        return Decision(True, f"{chosen.reason}, in vain: no weight has {most} bits or fewer (qat.oscillation.bits)")
    return chosen


def _decide_average(options: QATOptions, bits: int) -> Decision:
    if chosen := decision_of_switch(options.average):
        return chosen
    if not options.averaging.decay:
        return Decision(False, "qat.averaging.decay is 0")
    if bits <= LOW_BITS:
        return Decision(True, "low-bit training is noisy; the better of average and last is kept")
    return Decision(False, f"at {bits} bits the last weights are as good")


def _decide_re_estimate(qmodel: nn.Module, schedule: ScheduleOptions, bits: int) -> Decision:
    if plan_of(qmodel).options.batchnorm == "fold":
        return Decision(False, "BatchNorm is folded")
    if schedule.re_estimate != "auto":
        return Decision(schedule.re_estimate, "as the options say")
    if frozen_after(qmodel, schedule) < 1:
        return Decision(False, "its statistics are frozen, and the weights have learned with them")
    if bits < 8:
        return Decision(True, "below 8 bits weights keep switching, and running statistics lag")
    return Decision(False, "at 8 bits running statistics are right")


__getattr__ = renamed_attributes(__name__, Recipe="qat.recipe.QATRecipe", choose="qat.recipe.decide")
