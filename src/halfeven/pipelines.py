"""Run the steps that make a quantized model, in their order."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.checkpoint import restore
from halfeven.errors import (
    AlgorithmError,
    CalibrationError,
    CaptureError,
    CheckpointError,
    ConfigError,
    PlacementError,
    named,
)
from halfeven.graph.batches import Example, given_batches
from halfeven.graph.batchnorm import forget_statistics
from halfeven.graph.wrappers import unwrapped
from halfeven.layerwise.batches import inputs_in, read_inputs
from halfeven.layerwise.calibrate import calibrate
from halfeven.placement.captured_model import capture_for_quantization
from halfeven.placement.graph_edits import apply_changes
from halfeven.placement.insertion import check_scales, insert, plan_of
from halfeven.placement.make_plan import make_plan, skeleton
from halfeven.placement.options import BatchNormHandling, QuantizationFields, QuantizationOptions, Rule
from halfeven.placement.plan import Plan
from halfeven.placement.requantization import apply_rules
from halfeven.ptq.equalization.cross_layer import scaled_layers
from halfeven.ptq.options import PTQFields, PTQOptions, check_folds, split_fields
from halfeven.ptq.pipeline import EQUALIZATION, StepContext, run_steps
from halfeven.ptq.recipe import decide
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.features import Features
from halfeven.qat.options import QATOptions
from halfeven.qat.recipe import QATRecipe
from halfeven.qat.recipe import decide as decide_qat
from halfeven.qat.session import QATSession
from halfeven.renamed import renamed_attributes, renamed_parameters
from halfeven.runtimes.runtime import runtime_named
from halfeven.tasks.task import first_tensor


class QuantizeFields(QuantizationFields, PTQFields, total=False):
    """The fields that `quantize` takes by name in addition to its two option objects."""


@checked_arguments(CaptureError)
def plan(
    model: nn.Module,
    example: Example,
    options: QuantizationOptions | None = None,
    **changes: Unpack[QuantizationFields],
) -> Plan:
    """Decide how a model would be quantized, and insert nothing.

    Print the plan, change it with `Plan.with_rules`, and give it to `prepare`.

    Args:
        model: any module; it is not changed.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments.
        options: how to quantize.
        changes: fields of `QuantizationOptions` to set on top of `options`, for example `scheme="w4a8"`.

    Raises:
        CaptureError: nothing of the model could be captured.
        ConfigError: a field that does not exist, or a value that it cannot have.
        PlacementError: the target cannot do the scheme, or a rule held for nothing.
    """
    options = _with_batchnorm(dataclasses.replace(options or QuantizationOptions(), **changes), "keep")
    captured, found = capture_for_quantization(model, example, options)
    return make_plan(skeleton(captured), options, runtime_named(options.target).target, found)


@checked_arguments(CaptureError)
def prepare(
    model: nn.Module,
    example: Example,
    options: QuantizationOptions | None = None,
    *,
    plan: Plan | None = None,
    **changes: Unpack[QuantizationFields],
) -> nn.Module:
    """Make a quantized model of a float model: an ordinary `nn.Module` with quantizers whose ranges are not yet set.

    The float model is not changed; the result has its own parameters. Call `calibrate` next; then train the result
    like any module, or use it directly.

    Args:
        model: any module.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments.
        options: how to quantize.
        plan: the quantizers to insert, from `plan`, in the place of options.
        changes: fields of `QuantizationOptions` to set on top of `options`, for example `scheme="w4a8"`.

    Raises:
        CaptureError: nothing of the model could be captured.
        ConfigError: a field that does not exist, a value that it cannot have, or a plan together with options.
        PlacementError: the target cannot do the scheme, a rule held for nothing, or the plan is of another model.
    """
    if plan is not None:
        if options is not None or changes:
            raise ConfigError(
                "A plan was given together with options, and a plan already contains options, so the given options "
                "would have no effect. Give the options to halfeven.plan, or leave the plan out."
            )
        return _quantize_by_plan(model, example, plan, check=check_scales)
    options = _with_batchnorm(dataclasses.replace(options or QuantizationOptions(), **changes), "keep")
    target = runtime_named(options.target).target
    captured, found = capture_for_quantization(model, example, options)
    return insert(captured, make_plan(captured, options, target, found), target)


@checked_arguments(PlacementError)
def set_rules(qmodel: nn.Module, rules: Rule | Sequence[Rule]) -> tuple[str, ...]:
    """Change bits and observers of a quantized model by further rules, in place, and update its plan.

    Quantizers that the rules change have no range afterwards. Calibrate the model again before you give its parameters
    to an optimizer. All other quantizers keep their ranges.

    Args:
        qmodel: a model from `prepare`, `quantize` or `load`, calibrated or not.
        rules: a rule or several rules, which win over those of the model's plan.

    Returns:
        Names of the quantizers that have no range now.

    Raises:
        PlacementError: a rule holds for nothing, or the target cannot do its bits; the model is unchanged.
    """
    given = (rules,) if isinstance(rules, Rule) else tuple(rules)
    qmodel = unwrapped(qmodel)
    return apply_rules(qmodel, given, runtime_named(plan_of(qmodel).options.target).target)


def _with_batchnorm(options: QuantizationOptions, handling: BatchNormHandling) -> QuantizationOptions:
    """Return the options with this handling of BatchNorm, if the user has not chosen any."""
    return dataclasses.replace(options, batchnorm=handling) if options.batchnorm == "auto" else options


def without_training(options: QuantizationOptions) -> QuantizationOptions:
    """Return the options of post-training quantization: BatchNorm folded, and no range that only training would learn.

    A choice of the user stays.
    """
    if options.ranges == "auto":  # the gradient of scales is for trained ranges, in a config that is for training too
        options = dataclasses.replace(options, ranges="observed", gradient_scale="lsq")
    return _with_batchnorm(options, "fold")


def rebuild(model: nn.Module, example: Example, plan: Plan) -> nn.Module:
    """Make the quantized model that a plan describes, so that a checkpoint can be loaded into it."""
    # A checkpoint of another model is refused when it is loaded, with a list of all that differs.
    qmodel = _quantize_by_plan(model, example, plan, check=lambda captured, plan: None)
    forget_statistics(qmodel)  # they describe the weights given here, and the checkpoint will replace these
    return qmodel


def _quantize_by_plan(
    model: nn.Module, example: Example, plan: Plan, check: Callable[[nn.Module, Plan], None]
) -> nn.Module:
    captured, _ = capture_for_quantization(model, example, plan.options, plan.kept)
    check(captured, plan)
    qmodel = insert(captured, plan, runtime_named(plan.options.target).target)
    return apply_changes(qmodel, plan.changes)


@checked_arguments(CheckpointError)
def load(path: str | Path, model: nn.Module, example: Example) -> nn.Module:
    """Return the quantized model of a checkpoint that `save` wrote, in eval mode.

    Args:
        path: the `.safetensors` file.
        model: the float model, with any weights; it is not changed.
        example: an input, as for `prepare`.

    Raises:
        CheckpointError: the file is no such checkpoint, or belongs to another model; the message lists the differences.
        PlacementError: the file's plan names layers that this model does not have.
    """
    return restore(path, lambda plan: rebuild(model, example, plan)).eval()


@renamed_parameters(say="log", state="resume_dir")
@checked_arguments(AlgorithmError)
def quantize(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    options: QuantizationOptions | None = None,
    ptq: PTQOptions | None = None,
    *,
    example: Example | None = None,
    batches: int | None = None,
    log: Callable[[str], None] | None = None,
    resume_dir: Path | None = None,
    **changes: Unpack[QuantizeFields],
) -> nn.Module:
    """Quantize a model after training, by the steps that suit the model, the bits and the data (white paper, figure 8).

    BatchNorm is folded first. `halfeven.ptq.recipe.decide` chooses the steps, and passes the decisions with their
    reasons to `log`; `ptq` switches each step on or off.

    Args:
        model: any module; it is not changed.
        loader: calibration batches, as `calibrate` takes them: about 500 samples of the training data, transformed as
            in evaluation. None: the data-free path, which needs `example`.
        options: how to quantize.
        ptq: the steps to take, and their settings.
        example: an input, as for `prepare`, which says how many entries of a batch are inputs; None: the loader's first
            batch, of which the model gets as many entries as its forward requires.
        batches: largest number of the loader's batches to read; None: all.
        log: called with the plan, the decisions and the result of each step, for example `print`.
        resume_dir: folder in which reconstruction saves finished layers; after an interruption it continues from them.
        changes: fields of `QuantizationOptions` or `PTQOptions` to set on top of `options` and `ptq`.

    Returns:
        The quantized model in eval mode.

    Raises:
        CalibrationError: the loader yielded no batch, NaN, or a batch unlike the example.
        ConfigError: neither a loader nor an example, a batch that may hold optional inputs or labels, an option that
            does not exist, a value that it cannot have, or a `batchnorm` other than "fold".
        CaptureError, PlacementError, AlgorithmError: as the steps raise them.
    """
    options, ptq = split_fields(
        options or QuantizationOptions(), ptq or PTQOptions(), changes, further=("loader", "example", "batches")
    )
    check_folds(options)
    log = log or (lambda text: None)
    data = None if loader is None else batches_in_memory(loader, batches)
    if data is None and example is None:
        raise ConfigError(
            "Neither data nor an example input was given, so the model cannot be run even once. Give a loader of "
            "calibration batches or, for the data-free path, example=an input of the right shape."
        )
    qmodel = prepare_folded(model, data or (), options, example)
    return quantize_prepared(qmodel, data, ptq, log=log, resume_dir=resume_dir)


def prepare_folded(
    model: nn.Module, batches: Sequence[Any], options: QuantizationOptions, example: Example | None
) -> nn.Module:
    """Prepare a model as post-training quantization needs it: BatchNorm folded, no range that only training learns.

    Args:
        model: the float model.
        batches: calibration batches, the first of which is the example where none is given.
        options: how to quantize.
        example: an input.
    """
    if example is None:
        args, kwargs = inputs_in(model, batches[0])
        example = kwargs or args
    return prepare(model, example, without_training(options))


def quantize_prepared(
    qmodel: nn.Module,
    batches: Sequence[Any] | None,
    ptq: PTQOptions,
    *,
    log: Callable[[str], None],
    resume_dir: Path | None = None,
) -> nn.Module:
    """Take the steps of `quantize` on a model from `prepare` with BatchNorm folded, which they may change.

    Args:
        qmodel: the prepared model.
        batches: calibration batches, which are read several times; None: the data-free path.
        ptq: the steps to take, and their settings.
        log: called with the plan, the decisions and the result of each step.
        resume_dir: folder in which reconstruction saves finished layers.

    Returns:
        The quantized model in eval mode.
    """
    qmodel.eval()
    recipe = decide(qmodel, ptq, data=batches is not None)
    log(f"{plan_of(qmodel)}\n\n{recipe}\n")
    # The labels are taken off once: the steps read arguments of the model.
    inputs = _input_arguments(qmodel, batches or ())
    context = StepContext(qmodel=qmodel, batches=inputs, recipe=recipe, options=ptq, log=log, resume_dir=resume_dir)
    return run_steps(context).eval()


@renamed_parameters(say="log", state="resume_dir")
@checked_arguments(AlgorithmError)
def setup_qat(
    qmodel: nn.Module,
    float_model: nn.Module | None,
    loader: Iterable[Any],
    options: QATOptions | None = None,
    schedule: ScheduleOptions | None = None,
    *,
    ptq: PTQOptions | None = None,
    inputs: Callable[[], Iterable[Any]] | None = None,
    log: Callable[[str], None] | None = None,
    resume_dir: Path | None = None,
    logits: Callable[[Any], Tensor] = first_tensor,
) -> QATSession:
    """Prepare a calibrated model for training by the recipe for its bits (white paper, figure 11).

    Args:
        qmodel: a model from `prepare`, calibrated. Its channels are equalized and its rounding is learned, in place,
            if the recipe contains these steps.
        float_model: the float model that `qmodel` was made from, for distillation; it is not changed.
        loader: calibration batches, as `calibrate` takes them; iterated several times, and kept in memory if it is an
            iterator.
        options: the steps to take, and their settings.
        schedule: the shares of the run after which ranges and BatchNorm's statistics stop changing.
        ptq: settings of equalization and of learned rounding.
        inputs: returns batches for BatchNorm's statistics, preferably more than for calibration; None: the loader's.
        log: called with the decisions and the result of each step, for example `print`.
        resume_dir: folder in which learned rounding saves finished layers; after an interruption it continues from
            them.
        logits: extracts the logits, [samples, ..., classes], from a model's output; by default the first tensor.

    Returns:
        The session; the trainer, or your own loop, calls its hooks before, in and after each step.

    Raises:
        ConfigError: equalization is on, and BatchNorm is not folded, or distillation compares features that it scales.
        AlgorithmError: as the steps raise it.
    """
    qmodel = unwrapped(qmodel)
    options = options or QATOptions()
    schedule = schedule or ScheduleOptions()
    log = log or (lambda text: None)
    if isinstance(loader, Iterator):  # it gives its batches once
        loader = batches_in_memory(loader, None)
    recipe = decide_qat(qmodel, options, schedule)
    log(f"{recipe}\n")
    check_features(qmodel, recipe, options)
    ptq = ptq or PTQOptions()
    if recipe.equalize.enabled:
        # White paper, figure 11: equalization comes before the ranges, which are therefore set again.
        batches = _input_arguments(qmodel, batches_in_memory(loader, None))
        steps = PTQOptions(equalize="on", relu6=ptq.relu6, absorb=ptq.absorb)  # no others are taken
        ptq_recipe = decide(qmodel, steps, data=True)
        context = StepContext(qmodel=qmodel, batches=batches, recipe=ptq_recipe, options=steps, log=log)
        run_steps(context, EQUALIZATION)
        calibrate(qmodel, batches)
    if recipe.reconstruct.enabled:
        learn = reconstruct if recipe.blocks else adaround
        report = learn(qmodel, loader, options=ptq, resume_dir=resume_dir, log=log)
        log(f"Reconstructed {len(report.blocks)} blocks in {sum(block.seconds for block in report.blocks):.0f} s.")
    return resume_qat(qmodel, float_model, recipe, loader, options, schedule, inputs, logits)


def check_features(qmodel: nn.Module, recipe: QATRecipe, options: QATOptions) -> None:
    """Raise ConfigError where equalization would scale the channels of a layer that distillation compares."""
    features = options.distillation.features if recipe.distill.enabled and recipe.equalize.enabled else ()
    compared = Features(qmodel, "student", features, with_gradients=True).names
    if scaled := sorted(scaled_layers(qmodel) & set(compared) if features else ()):
        raise ConfigError(
            f"Cross-layer equalization would scale the channels of {named(scaled)}, which distillation compares with "
            'the float model\'s (qat.distillation.features), so they would never match. Set qat.equalize="off", give '
            "weights a scale per channel, or compare the outputs alone (qat.distillation.weight)."
        )


def resume_qat(
    qmodel: nn.Module,
    float_model: nn.Module | None,
    recipe: QATRecipe,
    loader: Iterable[Any],
    options: QATOptions,
    schedule: ScheduleOptions,
    inputs: Callable[[], Iterable[Any]] | None = None,
    logits: Callable[[Any], Tensor] = first_tensor,
) -> QATSession:
    """Return the session of a resumed training run, whose start `setup_qat` prepared."""
    return QATSession(unwrapped(qmodel), float_model, recipe, options, schedule, loader, inputs, logits)


def batches_in_memory(loader: Iterable[Any], batches: int | None) -> list[Any]:
    """Return all batches; kept in memory, since the steps read them many times."""
    found = list(given_batches(loader, batches))
    if not found:
        raise CalibrationError(
            "The loader gave no batch, so the model cannot be captured and no range can be set. Give a loader with at "
            "least one batch; an iterator that was used up before looks empty."
        )
    return found


def _input_arguments(qmodel: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Return the model's arguments of batches, without labels: a tuple or a dict for each."""
    return [kwargs or args for args, kwargs in read_inputs(qmodel, batches)]


__getattr__ = renamed_attributes(__name__, accompany="pipelines.setup_qat", course_of="pipelines.resume_qat")
