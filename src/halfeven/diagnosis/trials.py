"""Try a remedy on a copy of a quantized model, and measure how much of the damage it takes away."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfeven.diagnosis.sensitivity import Reference, divergence_of
from halfeven.errors import HalfevenError, HalfevenWarning
from halfeven.evaluation import evaluating
from halfeven.graph.copying import copy_model
from halfeven.layerwise.calibrate import calibrate, run_batches
from halfeven.placement.insertion import plan_of
from halfeven.placement.options import Rule, rule_text
from halfeven.placement.requantization import apply_plan, apply_rules
from halfeven.ptq.equalization.cross_layer import equalize
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.reconstruct import adaround
from halfeven.ptq.transformers.reparametrization import reparametrize
from halfeven.ptq.transformers.smoothing import smooth
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode
from halfeven.runtimes.runtime import runtime_named

Batches = Sequence[Any]
TRIAL_STEPS = 100
"""Steps of each layer's learned rounding in a trial; half of what the pipeline takes."""


@dataclass(frozen=True)
class Remedy:
    """A change of how a model is quantized."""

    name: str
    """In words: "observer minmax", "in float"."""
    paste: str
    """The argument of `halfeven.prepare` or `halfeven.quantize` that makes it."""
    apply: Callable[[nn.Module, Batches], None]
    """Makes it in a calibrated model, and sets the ranges that are missing then."""
    rules: tuple[Rule, ...] = ()
    """The rules that make it, if rules do."""
    options: tuple[tuple[str, Any], ...] = ()
    """The fields of `QuantizationOptions` or `PTQOptions` that make it, if they do."""


@dataclass(frozen=True)
class Trial:
    """The result of a remedy that was tried."""

    remedy: Remedy
    divergence: float
    """Divergence of the changed model from the float model."""
    failed: str = ""
    """Why the remedy cannot be applied to this model."""


def try_remedy(qmodel: nn.Module, remedy: Remedy, batches: Batches, reference: Reference) -> tuple[Trial, nn.Module]:
    """Apply a remedy to a copy of a model. Returns the trial and the copy."""
    # A remedy that cannot be applied may stop half-way, so its copy is not used further.
    copied = copy_model(qmodel)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", HalfevenWarning)
            remedy.apply(copied, batches)
    except HalfevenError as error:
        return Trial(remedy, float("inf"), str(error)), qmodel
    return Trial(remedy, divergence_of(copied, reference)), copied


def rules_argument(rules: Sequence[Rule]) -> str:
    """Return rules as an argument to paste."""
    return f"rules=({', '.join(rule_text(vars(rule)) for rule in rules)},)"


def remedy_by_rules(name: str, rules: Sequence[Rule]) -> Remedy:
    """Return a remedy that adds rules to the plan."""

    def apply(qmodel: nn.Module, batches: Batches) -> None:
        apply_rules(qmodel, rules, runtime_named(plan_of(qmodel).options.target).target)
        calibrate_missing(qmodel, batches)

    return Remedy(name, rules_argument(rules), apply, rules=tuple(rules))


def remedy_by_option(name: str, **changes: Any) -> Remedy:
    """Return a remedy that changes options of quantization."""

    def apply(qmodel: nn.Module, batches: Batches) -> None:
        plan = plan_of(qmodel)
        assert plan.decide is not None
        # Algorithms have changed the graph since the plan was made: the new plan keeps the record of it.
        after = dataclasses.replace(plan.decide(dataclasses.replace(plan.options, **changes)), changes=plan.changes)
        apply_plan(qmodel, after, runtime_named(plan.options.target).target)
        calibrate_missing(qmodel, batches)

    return Remedy(name, _options_text(changes), apply, options=tuple(changes.items()))


def remedy_by_step(name: str, step: Callable[[nn.Module, Batches], Any], **changes: Any) -> Remedy:
    """Return a remedy that takes a step of post-training quantization.

    Args:
        name: in words.
        step: changes the model; its ranges are set afterwards.
        changes: the fields of `PTQOptions` that make `halfeven.quantize` take it.
    """

    def apply(qmodel: nn.Module, batches: Batches) -> None:
        step(qmodel, batches)
        calibrate(qmodel, batches)

    return Remedy(name, _options_text(changes), apply, options=tuple(changes.items()))


def _recalibrate(qmodel: nn.Module, batches: Batches) -> None:
    calibrate(qmodel, batches)


def _learn_rounding(qmodel: nn.Module, batches: Batches) -> None:
    # `try_remedy` switches gradients off, and AdaRound learns by them.
    with torch.enable_grad():
        adaround(qmodel, batches, options=PTQOptions(iterations=TRIAL_STEPS), log=lambda text: None)


def _options_text(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in changes.items()).replace("'", '"')


@torch.no_grad()
def calibrate_missing(qmodel: nn.Module, batches: Batches) -> None:
    """Set the ranges of the quantizers that have none, as `halfeven.calibrate` does; all others keep theirs."""
    missing = [q for q in quantizers(qmodel).values() if not q.state.has_range]
    if not missing:
        return
    # Ranges are those of float activations in a model with quantized weights.
    others = [q for q in quantizers(qmodel).values() if not q.weight and q not in missing]
    for quantizer in missing:
        quantizer.start_calibration()
    # Passing floats, they do not hide from the new observers what their own ranges clip.
    for quantizer in others:
        quantizer.mode = Mode.FLOAT
    with evaluating(qmodel):
        run_batches(qmodel, batches)
    for quantizer in missing:
        quantizer.finish_calibration()
    for quantizer in others:
        quantizer.mode = Mode.QUANTIZE


RECALIBRATE = Remedy(
    "calibrated again with these batches",
    "halfeven.calibrate(qmodel, batches)",
    _recalibrate,
)
SMOOTH = remedy_by_step("smoothing", smooth, smooth="on")
REPARAMETRIZE = remedy_by_step("reparametrization", reparametrize, reparametrize="on")
EQUALIZE = remedy_by_step("equalization", lambda qmodel, batches: equalize(qmodel), equalize="on")
EQUALIZE_ACROSS_CLIPS = remedy_by_step(
    "equalization across ReLU6",
    lambda qmodel, batches: equalize(qmodel, across_clips=True),
    equalize="on",
    relu6="per_channel",
)
LEARN_ROUNDING = remedy_by_step("learned rounding", _learn_rounding, reconstruct="layers")
PER_CHANNEL = remedy_by_option("weights per channel", per_channel=True)
