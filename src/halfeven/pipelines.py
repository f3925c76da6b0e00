"""The ways to a quantized model: the steps in their order, nothing else."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfeven.checkpoint import restore
from halfeven.errors import CalibrationError, ConfigError
from halfeven.graph.batchnorm import forget_statistics
from halfeven.graph.capture import Example, as_arguments, batched, inputs_of
from halfeven.graph.torch_private import pytree
from halfeven.layerwise.calibrate import calibrate
from halfeven.placement.captured_model import capture_for_quantization
from halfeven.placement.graph_edits import apply_changes
from halfeven.placement.insertion import insert, plan_of, record_example
from halfeven.placement.make_plan import make_plan
from halfeven.placement.plan import Plan, QuantizationOptions
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.pipeline import equalize_channels, take_steps
from halfeven.ptq.recipe import decide
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.options import QATOptions
from halfeven.qat.recipe import QATRecipe
from halfeven.qat.recipe import decide as decide_qat
from halfeven.qat.session import QATSession
from halfeven.renamed import renamed_attributes, renamed_parameters
from halfeven.runtimes.runtime import runtime_named
from halfeven.tasks.task import first_tensor


def prepare(
    model: nn.Module, example: Example, options: QuantizationOptions | None = None, **changes: Any
) -> nn.Module:
    """Make a quantized model of a float one: an ordinary `nn.Module` with quantizers whose ranges are not yet set.

    The float model is not changed; the result has its own parameters. Follow with `calibrate`, then train it like any
    module, or use it as it is.

    Args:
        model: any module.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments.
        options: how to quantize.
        changes: fields of `QuantizationOptions` to set on top of `options`, for example `scheme="w4a8"`.

    Raises:
        CaptureError: nothing of the model could be captured.
        ConfigError: a field that does not exist, or a value that it cannot have.
        PlacementError: the target cannot do the scheme, or a rule held for nothing.
    """
    options = _changed(options or QuantizationOptions(), changes)
    target = runtime_named(options.target).target
    captured, notes = capture_for_quantization(copy.deepcopy(model), example, options)
    return _with_example(insert(captured, make_plan(captured, options, target, notes), target), example)


def _changed(
    options: QuantizationOptions, changes: dict[str, Any], others: tuple[str, ...] = ()
) -> QuantizationOptions:
    names = [field.name for field in dataclasses.fields(options)]
    for unknown in [name for name in changes if name not in names]:
        near = difflib.get_close_matches(unknown, [*names, *others], n=1)
        meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
        raise ConfigError(f'Quantization has no option "{unknown}", so it would be without effect. {meant}')
    return dataclasses.replace(options, **changes)


def rebuild(model: nn.Module, example: Example, plan: Plan) -> nn.Module:
    """Make the quantized model that a plan describes, for a checkpoint to be loaded into."""
    captured, _ = capture_for_quantization(copy.deepcopy(model), example, plan.options)
    forget_statistics(captured)  # of the weights given here, not of those that the checkpoint brings
    qmodel = insert(captured, plan, runtime_named(plan.options.target).target)
    return _with_example(apply_changes(qmodel, plan.changes), example)


def load(path: str | Path, model: nn.Module, example: Example) -> nn.Module:
    """The quantized model of a checkpoint that `save` wrote, in eval mode.

    Args:
        path: the `.safetensors` file.
        model: the float model, with any weights; it is not changed.
        example: an input, as for `prepare`.

    Raises:
        CheckpointError: a file of something else, or of a model of other shapes; the message lists what differs.
        PlacementError: the file's plan names layers that this model does not have.
    """
    return restore(path, lambda plan: rebuild(model, example, plan)).eval()


def _with_example(qmodel: nn.Module, example: Example) -> nn.Module:
    """Keep two samples of the example with the model: exporting traces it again."""
    args, kwargs = batched(*as_arguments(example))

    def two(x: Any) -> Any:
        return x[:2].detach().cpu() if isinstance(x, Tensor) and x.ndim else x

    record_example(qmodel, pytree.tree_map(two, (args, kwargs)))
    return qmodel


@renamed_parameters(say="log", state="resume_dir")
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
    **changes: Any,
) -> nn.Module:
    """Post-training quantization: the steps that suit the model, the bits and the data (white paper, figure 8).

    BatchNorm is folded first. Which steps are taken is decided by `halfeven.ptq.recipe.decide` and passed to `log` with
    the reasons; `ptq` switches each of them.

    Args:
        model: any module; it is not changed.
        loader: calibration batches, as `calibrate` takes them; some 500 samples of the training data, seen as in
            evaluation. None: the data-free path, which needs `example`.
        options: how to quantize.
        ptq: which steps to take, and how.
        example: an input, as for `prepare`; None: the loader's first batch.
        batches: how many of the loader's batches to take; None: all.
        log: called with the plan, the decisions and the result of each step, for example `print`.
        resume_dir: folder in which a reconstruction keeps finished layers, to go on from after an interruption.
        changes: fields of `QuantizationOptions` or `PTQOptions` to set on top of the two.

    Returns:
        The quantized model in eval mode.

    Raises:
        CalibrationError: the loader gave nothing, or NaN.
        ConfigError: neither a loader nor an example, or an option that does not exist.
        CaptureError, PlacementError, AlgorithmError: as the steps raise them.
    """
    options, ptq = _split(options or QuantizationOptions(), ptq or PTQOptions(), changes)
    log = log or (lambda text: None)
    data = None if loader is None else _at_hand(loader, batches)
    if data is None and example is None:
        raise ConfigError(
            "Neither data nor an example input was given, so the model cannot be run even once. Give a loader of "
            "calibration batches or, for the data-free path, example=an input of the right shape."
        )
    if example is None and data:
        args, kwargs = data[0]
        example = kwargs or args
    assert example is not None
    qmodel = prepare(model, example, options, batchnorm="fold").eval()
    recipe = decide(qmodel, ptq, data=data is not None)
    log(f"{plan_of(qmodel)}\n\n{recipe}\n")
    qmodel = take_steps(qmodel, [kwargs or args for args, kwargs in data or ()], recipe, ptq, log, resume_dir)
    return qmodel.eval()


@renamed_parameters(say="log", state="resume_dir")
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
    """Make a calibrated model ready for training, as the recipe for its bits says (white paper, figure 11).

    Args:
        qmodel: a model from `prepare`, calibrated; its channels are equalized and its rounding is learned, in place,
            where the recipe starts from that.
        float_model: the model that it was made of, for distillation; it is not changed.
        loader: calibration batches, as `calibrate` takes them; iterated several times.
        options: which steps to take, and how.
        schedule: when ranges and BatchNorm stop moving.
        ptq: how channels are equalized and rounding is learned.
        inputs: gives batches for BatchNorm's statistics, better more than those of the calibration; None: the loader.
        log: called with the decisions and the result of each step, for example `print`.
        resume_dir: folder in which learned rounding keeps finished layers, to go on from after an interruption.
        logits: takes the logits, [samples, ..., classes], out of what the models return; by default the first tensor.

    Returns:
        The session, whose hooks the trainer, or a loop of your own, calls before, in and after each step.

    Raises:
        ConfigError: equalization is asked for, and BatchNorm is not folded.
        AlgorithmError: as the steps raise it.
    """
    options = options or QATOptions()
    schedule = schedule or ScheduleOptions()
    log = log or (lambda text: None)
    recipe = decide_qat(qmodel, options, schedule)
    log(f"{recipe}\n")
    ptq = ptq or PTQOptions()
    if recipe.equalize.enabled:
        batches = [kwargs or args for args, kwargs in _at_hand(loader, None)]
        ptq = dataclasses.replace(ptq, equalize="on")
        equalize_channels(qmodel, batches, decide(qmodel, ptq, data=True), ptq, log)
        calibrate(qmodel, batches)
    if recipe.reconstruct.enabled:
        learn = reconstruct if recipe.blocks else adaround
        report = learn(qmodel, loader, options=ptq, resume_dir=resume_dir, log=log)
        log(f"Reconstructed {len(report.units)} units in {sum(unit.seconds for unit in report.units):.0f} s.")
    return resume_qat(qmodel, float_model, recipe, loader, options, schedule, inputs, logits)


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
    """Return the session of a training whose start `setup_qat` has made, for a run that is resumed."""
    return QATSession(qmodel, float_model, recipe, options, schedule, loader, inputs, logits)


def _at_hand(loader: Iterable[Any], batches: int | None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The model's arguments of all batches: the steps go over them many times, and reading images costs more."""
    found = [inputs_of(batch) for batch in islice(loader, batches)]
    if not found:
        raise CalibrationError(
            "The loader gave no batch, so there is nothing to capture the model with and to set ranges from. Give a "
            "loader with at least one batch; an iterator that was used up before looks empty."
        )
    return found


def _split(
    options: QuantizationOptions, ptq: PTQOptions, changes: dict[str, Any]
) -> tuple[QuantizationOptions, PTQOptions]:
    """Both kinds of options with the changes that are theirs."""
    names = tuple(field.name for field in dataclasses.fields(ptq))
    steps = {name: value for name, value in changes.items() if name in names}
    others = {name: value for name, value in changes.items() if name not in names}
    return _changed(options, others, names), dataclasses.replace(ptq, **steps)


__getattr__ = renamed_attributes(__name__, accompany="pipelines.setup_qat", course_of="pipelines.resume_qat")
