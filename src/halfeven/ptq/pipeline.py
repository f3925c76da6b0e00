"""The steps of post-training quantization on a prepared model, in the white paper's order (section 3.5, figure 8).

An algorithm has a file of its own. It becomes part of the pipeline by a `Step` in `STEPS` and a line in
`halfeven.ptq.recipe.DECISIONS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.graph.copying import copy_model
from halfeven.layerwise.calibrate import calibrate
from halfeven.layerwise.outputs import first_samples, float_outputs, quantized_outputs
from halfeven.layerwise.sqnr import sqnr, top1_agreement
from halfeven.ptq.bias_correction import correct_biases
from halfeven.ptq.data_free.calibrate import correct_biases_analytically, ranges_from_batchnorm
from halfeven.ptq.equalization.bias_absorption import absorb_biases
from halfeven.ptq.equalization.cross_layer import equalize, unclip_relu6
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.recipe import (
    ABSORB,
    CORRECT_BIASES,
    EQUALIZE,
    RECONSTRUCT,
    REPARAMETRIZE,
    SMOOTH,
    UNCLIP,
    PTQRecipe,
)
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.ptq.transformers.reparametrization import reparametrize
from halfeven.ptq.transformers.smoothing import smooth

UNCLIPPING_TRIAL_SAMPLES = 64
"""Samples on which the quantized model with ReLU6 is compared with the one with ReLU."""
BIAS_CORRECTION_TRIAL_SAMPLES = 256
"""Samples on which the gain of the bias correction is measured."""

Log = Callable[[str], None]


@dataclass(kw_only=True)
class StepContext:
    """The model on its way through the steps, and all that a step may use."""

    qmodel: nn.Module
    """A model from `prepare`, with BatchNorm folded. A step changes it in place, or puts another in its place."""
    batches: Sequence[Any]
    """Calibration batches, iterated several times; empty where there is no data."""
    recipe: PTQRecipe
    options: PTQOptions
    log: Log
    """Called with the result of each step."""
    resume_dir: Path | None = None
    """Folder for the finished blocks of a reconstruction."""
    float_weights: nn.Module | None = None
    """Copy of the calibrated model from before its rounding was learned, for steps that need the float weights."""


@dataclass(frozen=True)
class Step:
    """One step of post-training quantization."""

    name: str
    """As the recipe prints it."""
    applies: Callable[[StepContext], bool]
    """Returns True where the step is to be taken."""
    run: Callable[[StepContext], None]
    """Takes the step."""


def run_steps(context: StepContext, steps: Sequence[Step] | None = None) -> nn.Module:
    """Take the steps that apply, in order, and return the quantized model, which may be another object than before.

    Args:
        context: the prepared model, the data and the recipe.
        steps: the steps; None: `STEPS`.
    """
    for step in STEPS if steps is None else steps:
        if step.applies(context):
            step.run(context)
    return context.qmodel


def enabled_step(name: str, run: Callable[[StepContext], None]) -> Step:
    """Return a step that applies where the recipe's decision of the same name is yes."""
    return Step(name, lambda context: context.recipe.enabled(name), run)


# Equalization


def _unclip(context: StepContext) -> None:
    if context.recipe.data and context.options.relu6 != "replace" and not _gains_by_unclipping(context):
        return
    unclip_relu6(context.qmodel)


def _gains_by_unclipping(context: StepContext) -> bool:
    """Quantize two copies of the model, with ReLU6 and with ReLU, and compare both with the float model."""
    trial = first_samples(context.batches, UNCLIPPING_TRIAL_SAMPLES)
    expected = float_outputs(context.qmodel, trial)
    kept = _trial_copy(context)
    replaced = _trial_copy(context)
    unclip_relu6(replaced.qmodel)
    for copied in (kept, replaced):
        run_steps(copied, AFTER_UNCLIPPING)
        calibrate(copied.qmodel, trial)
    sqnr_without = sqnr(quantized_outputs(kept.qmodel, trial), expected)
    sqnr_with = sqnr(quantized_outputs(replaced.qmodel, trial), expected)
    changed = float_outputs(replaced.qmodel, trial)
    agreement = top1_agreement(changed, expected)
    same = "" if agreement is None else f", with {100 * agreement:.1f} % of its top-1 answers the same"
    context.log(
        f"ReLU6 to ReLU: the quantized outputs have an SQNR of {sqnr_with:.1f} dB with it, {sqnr_without:.1f} dB "
        f"without, so it {'is done' if sqnr_with > sqnr_without else 'is left'}; it moves the float model's "
        f"own outputs to {sqnr(changed, expected):.1f} dB{same}."
    )
    return sqnr_with > sqnr_without


def _trial_copy(context: StepContext) -> StepContext:
    """Return a context with a copy of the model, whose steps are not logged."""
    return StepContext(
        qmodel=copy_model(context.qmodel),
        batches=context.batches,
        recipe=context.recipe,
        options=context.options,
        log=lambda text: None,
    )


def _equalize(context: StepContext) -> None:
    context.log(str(equalize(context.qmodel)).split("\n")[0])


def _absorb(context: StepContext) -> None:
    context.log(str(absorb_biases(context.qmodel, context.batches or None)).split("\n")[0])


# Transformers


def _smooth(context: StepContext) -> None:
    context.log(str(smooth(context.qmodel, context.batches, strength=context.options.smoothing_strength)))


def _reparametrize(context: StepContext) -> None:
    context.log(str(reparametrize(context.qmodel, context.batches)))


# Calibration, rounding and biases, with data


def _has_data(context: StepContext) -> bool:
    return context.recipe.data


def _calibrate(context: StepContext) -> None:
    calibrate(context.qmodel, context.batches)


def _reconstruct(context: StepContext) -> None:
    if context.recipe.enabled(CORRECT_BIASES):
        # After the reconstruction only rounded weights are left, and the bias correction compares with float outputs.
        context.float_weights = copy_model(context.qmodel)
    algorithm = adaround if context.recipe.granularity == "layers" else reconstruct
    report = algorithm(
        context.qmodel, context.batches, options=context.options, resume_dir=context.resume_dir, log=context.log
    )
    seconds = sum(block.seconds for block in report.blocks)
    context.log(f"Reconstructed {len(report.blocks)} {context.recipe.granularity} in {seconds:.0f} s.")
    if context.recipe.granularity == "layers":
        calibrate(context.qmodel, context.batches)  # the weights have moved, and the activations with them


def _corrects_with_data(context: StepContext) -> bool:
    return context.recipe.data and context.recipe.enabled(CORRECT_BIASES)


def _correct_biases(context: StepContext) -> None:
    """Correct the biases of a copy, and keep it where the user insists or the quantized model gains."""
    corrected = copy_model(context.qmodel)
    report = correct_biases(corrected, context.batches, reference=context.float_weights, options=context.options)
    # Biases have moved the activations, so that their ranges are set again before anything is measured.
    calibrate(corrected, context.batches)
    context.log(str(report))
    if context.options.correct_biases == "on" or _gains_by_correction(context, corrected):
        context.qmodel = corrected


def _gains_by_correction(context: StepContext, corrected: nn.Module) -> bool:
    trial = first_samples(context.batches, BIAS_CORRECTION_TRIAL_SAMPLES)
    reference = context.qmodel if context.float_weights is None else context.float_weights
    expected = float_outputs(reference, trial)
    sqnr_without = sqnr(quantized_outputs(context.qmodel, trial), expected)
    sqnr_with = sqnr(quantized_outputs(corrected, trial), expected)
    context.log(
        f"The quantized outputs have an SQNR of {sqnr_with:.2f} dB with the correction, {sqnr_without:.2f} dB without, "
        f"so it is {'kept' if sqnr_with > sqnr_without else 'undone'}."
    )
    return sqnr_with > sqnr_without


# Without data


def _has_no_data(context: StepContext) -> bool:
    return not context.recipe.data


def _corrects_without_data(context: StepContext) -> bool:
    return not context.recipe.data and context.recipe.enabled(CORRECT_BIASES)


def _correct_biases_analytically(context: StepContext) -> None:
    context.log(str(correct_biases_analytically(context.qmodel)))


def _set_ranges_without_data(context: StepContext) -> None:
    context.log(str(ranges_from_batchnorm(context.qmodel)))
    context.log(
        "No data was given: activation ranges are guesses from BatchNorm, rounding is to nearest, and nothing was "
        "measured. A few hundred unlabelled inputs make a better model: halfeven.quantize(model, loader)."
    )


AFTER_UNCLIPPING = (enabled_step(EQUALIZE, _equalize), enabled_step(ABSORB, _absorb))

EQUALIZATION = (enabled_step(UNCLIP, _unclip), *AFTER_UNCLIPPING)
"""The steps that give channels equal ranges; ranges that were set before must be set again."""

# The white paper's order (figure 8): equalization before any range is set; then ranges; then learned rounding, which
# needs the ranges of the weights, or bias correction. Both move activations, whose ranges are set again.
STEPS: tuple[Step, ...] = (
    *EQUALIZATION,
    enabled_step(SMOOTH, _smooth),
    enabled_step(REPARAMETRIZE, _reparametrize),
    Step("calibration", _has_data, _calibrate),
    enabled_step(RECONSTRUCT, _reconstruct),
    Step(CORRECT_BIASES, _corrects_with_data, _correct_biases),
    Step("analytic bias correction", _corrects_without_data, _correct_biases_analytically),
    Step("ranges from BatchNorm", _has_no_data, _set_ranges_without_data),
)
"""All steps, in the order in which they are taken."""
