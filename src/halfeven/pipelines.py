"""The ways to a quantized model: the steps in their order, nothing else."""

import copy
import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfeven.errors import CalibrationError, ConfigError
from halfeven.graph.batchnorm import fold, forget_statistics
from halfeven.graph.capture import Example, as_arguments, batched, capture, inputs_of
from halfeven.graph.lowering import lower_attention
from halfeven.placement.changes import apply_changes
from halfeven.placement.insertion import insert
from halfeven.placement.plan import Plan, QuantizationOptions
from halfeven.placement.planning import make_plan, regions
from halfeven.ptq.calibration import calibrate
from halfeven.training.checkpoint import restore


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
    captured, notes = _captured(model, example, options)
    return _with_example(insert(captured, make_plan(captured, options, notes)), example)


def _changed(options: QuantizationOptions, changes: dict[str, Any]) -> QuantizationOptions:
    names = [field.name for field in dataclasses.fields(options)]
    for unknown in [name for name in changes if name not in names]:
        near = difflib.get_close_matches(unknown, names, n=1)
        meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
        raise ConfigError(f'Quantization has no option "{unknown}", so it would be without effect. {meant}')
    return dataclasses.replace(options, **changes)


def rebuild(model: nn.Module, example: Example, plan: Plan) -> nn.Module:
    """Make the quantized model that a plan describes, for a checkpoint to be loaded into."""
    captured, _ = _captured(model, example, plan.options)
    forget_statistics(captured)  # of the weights given here, not of those that the checkpoint brings
    return _with_example(apply_changes(insert(captured, plan), plan.changes), example)


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

    qmodel.halfeven_example = pytree.tree_map(two, (args, kwargs))
    return qmodel


def _captured(model: nn.Module, example: Example, options: QuantizationOptions) -> tuple[nn.Module, tuple[str, ...]]:
    captured, report = capture(copy.deepcopy(model), example, options.leave_out)
    notes = [f"Stays Python, in float: {left}" for left in report.left]
    lowered = sum(lower_attention(region) for region in regions(captured).values())
    if lowered:
        notes.append(
            f"{lowered} attention operators are written out as products and softmax. Dropout inside of them, if there "
            "was any, takes no part in training: the model is captured in eval mode, where it is 0."
        )
    for region in regions(captured).values():
        if options.batchnorm == "fold":
            fold(region)
    captured.train(model.training)
    return captured, tuple(notes)


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    options: QuantizationOptions | None = None,
    *,
    batches: int | None = None,
    **changes: Any,
) -> nn.Module:
    """Post-training quantization: prepare with the loader's first batch as the example, and calibrate.

    Args:
        model: any module.
        loader: calibration batches, as `calibrate` takes them; it is iterated twice.
        options: as for `prepare`.
        batches: how many batches to calibrate on; None: all.
        changes: as for `prepare`.

    Returns:
        The quantized model in eval mode.
    """
    first = next(iter(loader), None)
    if first is None:
        raise CalibrationError(
            "The loader gave no batch, so there is nothing to capture the model with and to set ranges from. "
            "Give a loader that can be iterated twice and holds at least one batch."
        )
    args, kwargs = inputs_of(first)
    qmodel = prepare(model, kwargs or args, options, **changes)
    return calibrate(qmodel, loader, batches).eval()
