"""The steps of post-training quantization on a prepared model, in the white paper's order (section 3.5, figure 8).

An algorithm has a file of its own. It becomes part of the pipeline by a `Step` in `STEPS` and a line in
`halfeven.ptq.recipe.DECISIONS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from halfeven.ptq.options import PTQOptions, ReLU6Choice
from halfeven.ptq.recipe import (
    ABSORB,
    CORRECT_BIASES,
    EQUALIZE,
    RECONSTRUCT,
    REPARAMETRIZE,
    SMOOTH,
    UNCLIP,
    PTQRecipe,
    clips_little,
)
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.ptq.transformers.reparametrization import reparametrize
from halfeven.ptq.transformers.smoothing import smooth

RELU6_TRIAL_SAMPLES = 64
"""Samples on which the ways to pass ReLU6 are compared."""
RELU6_WAYS: dict[ReLU6Choice, str] = {"keep": "kept", "replace": "replaced", "per_channel": "clipped by channel"}
"""The ways, and what is said of a ReLU6 that is passed in each."""
MIN_GAIN_BY_CHANNEL = 0.5
"""dB that bounds by channel must gain over the best of the other ways, whose files are faster."""
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
    relu6: ReLU6Choice = "keep"
    """The treatment of ReLU6 by equalization."""
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


def _pass_relu6(context: StepContext) -> None:
    context.relu6 = context.options.relu6
    if context.relu6 == "auto":
        context.relu6 = _best_relu6_choice(context) if context.recipe.data else _relu6_choice_without_data(context)
    if context.relu6 == "replace":
        unclip_relu6(context.qmodel)


def _relu6_choice_without_data(context: StepContext) -> ReLU6Choice:
    return "replace" if clips_little(context.qmodel) else "per_channel"


def _best_relu6_choice(context: StepContext) -> ReLU6Choice:
    """Quantize a copy of the model in each way, and return the way that comes nearest to the float model.

    Bounds by channel cost an operator each, so they have to gain more.
    """
    trial = first_samples(context.batches, RELU6_TRIAL_SAMPLES)
    expected = float_outputs(context.qmodel, trial)
    found: dict[ReLU6Choice, float] = {}
    agreement = None
    for way in RELU6_WAYS:
        # The same steps as the pipeline takes, up to the ranges: what differs is the treatment of ReLU6 alone.
        copied = _trial_copy(context, way)
        run_steps(copied, EQUALIZATION)
        calibrate(copied.qmodel, trial)
        found[way] = sqnr(quantized_outputs(copied.qmodel, trial), expected)
        # This way alone changes the float model itself, so it is also told how many of its answers stay.
        if way == "replace":
            agreement = top1_agreement(float_outputs(copied.qmodel, trial), expected)
    # The two ways with fast files first; bounds by channel must beat the better of them by a margin.
    best: ReLU6Choice = "replace" if found["replace"] > found["keep"] else "keep"
    if found["per_channel"] >= found[best] + MIN_GAIN_BY_CHANNEL:
        best = "per_channel"
    same = "" if agreement is None else f" ({100 * agreement:.1f} % of the float top-1 stay)"
    context.log(
        f"ReLU6: the quantized outputs have an SQNR of {found['keep']:.1f} dB where it stays and stops the "
        f"equalization, {found['replace']:.1f} dB as ReLU{same}, {found['per_channel']:.1f} dB with bounds by channel, "
        f"so it is {RELU6_WAYS[best]}."
    )
    return best


def _trial_copy(context: StepContext, way: ReLU6Choice) -> StepContext:
    """Return a context with a copy of the model, which passes ReLU6 in this way and whose steps are not logged."""
    return StepContext(
        qmodel=copy_model(context.qmodel),
        batches=context.batches,
        recipe=context.recipe,
        options=replace(context.options, relu6=way),
        log=lambda text: None,
    )


def _equalize_layers(context: StepContext) -> None:
    report = equalize(context.qmodel, across_clips=context.relu6 == "per_channel")
    context.log(str(report).split("\n")[0])


def _absorb_biases(context: StepContext) -> None:
    context.log(str(absorb_biases(context.qmodel, context.batches or None)).split("\n")[0])


# Transformers


def _smooth_layernorms(context: StepContext) -> None:
    context.log(str(smooth(context.qmodel, context.batches, strength=context.options.smoothing_strength)))


def _reparametrize(context: StepContext) -> None:
    context.log(str(reparametrize(context.qmodel, context.batches)))


# Calibration, rounding and biases, with data


def _has_data(context: StepContext) -> bool:
    return context.recipe.data


def _calibrate_ranges(context: StepContext) -> None:
    calibrate(context.qmodel, context.batches)


def _learn_rounding(context: StepContext) -> None:
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
    """Return True if the corrected model is nearer to the float model, on part of the calibration data."""
    trial = first_samples(context.batches, BIAS_CORRECTION_TRIAL_SAMPLES)
    reference = context.qmodel if context.float_weights is None else context.float_weights
    expected = float_outputs(reference, trial)
    # After a reconstruction the model's own weights are rounded, so that its copy from before gives the float outputs.
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


EQUALIZATION = (
    enabled_step(UNCLIP, _pass_relu6),
    enabled_step(EQUALIZE, _equalize_layers),
    enabled_step(ABSORB, _absorb_biases),
)
"""The steps that give channels equal ranges; ranges that were set before must be set again."""

# The white paper's order (figure 8): equalization before any range is set; then ranges; then learned rounding, which
# needs the ranges of the weights, or bias correction. Both move activations, whose ranges are set again.
STEPS: tuple[Step, ...] = (
    *EQUALIZATION,
    enabled_step(SMOOTH, _smooth_layernorms),
    enabled_step(REPARAMETRIZE, _reparametrize),
    Step("calibration", _has_data, _calibrate_ranges),
    enabled_step(RECONSTRUCT, _learn_rounding),
    Step(CORRECT_BIASES, _corrects_with_data, _correct_biases),
    Step("analytic bias correction", _corrects_without_data, _correct_biases_analytically),
    Step("ranges from BatchNorm", _has_no_data, _set_ranges_without_data),
)
"""All steps, in the order in which they are taken."""
