"""Capture an unchanged model as a graph whose layers are real modules under their own names.

`torch.export` exports the model in eval mode; then `graph.rebuild` puts convolutions, linear layers, normalization and
dropout back as standard modules around the model's own parameters, so that the result has `train()` and `eval()`, the
float model's state dict, and any batch size. Where a model cannot be exported whole, its largest exportable submodules
are, and the rest stays Python.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CaptureError, named
from halfeven.graph.batches import Example, Inputs, as_arguments, batched, own_tensors, sample_count
from halfeven.graph.capture_parts import PartsCapture, record_inputs
from halfeven.graph.capture_report import CaptureReport
from halfeven.graph.dynamic_shapes import DynamicShapes, FreeAxes, batch_axes, export_shapes, free_axes
from halfeven.graph.export_module import (
    check_keywords,
    export_module,
    export_program,
    reason_of_fixed_batch_between_parts,
)
from halfeven.graph.inline import plain_forward
from halfeven.graph.kept_in_python import KeptInPython
from halfeven.graph.labels import add_loss, entries_with_labels, without_labels
from halfeven.graph.model_inputs import BATCH, model_inputs
from halfeven.graph.other_sizes import inner_free_axes
from halfeven.graph.output_classes import register_classes
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.same_outputs import check_same
from halfeven.graph.torch_private import has_own_hooks, pytree
from halfeven.graph.training_mode import Capture, capture_as_trained, restored_dropouts


def capture(
    model: nn.Module,
    example: Example,
    leave_out: Sequence[str] = (),
    kept: Sequence[KeptInPython] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
) -> tuple[nn.Module, CaptureReport]:
    """Rebuild a model as graph modules that share its parameters, and keep the example and its inputs with them.

    Args:
        model: any module; its training mode is restored.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments. The
            first axis of the first tensor, and of all tensors with as many samples, is the batch and stays free. With
            labels among them, which the model takes to return a loss, the captured model takes labels too, as keyword
            arguments.
        leave_out: names of submodules that shall stay Python, for example `["head"]`.
        kept: the modules whose own code stays Python for training, as an earlier capture reported them; None: they are
            looked for, by a run of both models in training mode.
        dynamic_shapes: further axes that stay free: input name -> {axis: the axis's name}.

    Returns:
        The captured model, in eval mode, and the report.

    Raises:
        CaptureError: a name of `leave_out` does not exist, an input has a name that Python has no parameters of,
            nothing could be captured, the model's code makes an axis in `dynamic_shapes` a constant, or the captured
            model differs from the original in its outputs or in what training does.
        ConfigError: `dynamic_shapes` names an input or an axis that the model does not have.
    """
    _check_leave_out(model, leave_out)
    # The graph to deploy is that of the inputs alone, for two samples, so that the batch stays free.
    register_classes([as_arguments(example)])
    whole = own_tensors(model, as_arguments(example))
    check_keywords(whole[1])
    given, labels = without_labels(model, whole)
    doubled = batched(*given)
    shapes = dynamic_shapes or {}

    def captured(inputs: Inputs) -> tuple[nn.Module, CaptureReport]:
        own_shapes = {name: axes for name, axes in shapes.items() if name not in labels}
        return _capture_whole_or_parts(model, inputs, tuple(leave_out), kept, own_shapes, may_return_others=not labels)

    was_training = {module: module.training for module in model.modules()}
    _forget_calls(model)
    try:
        # The graph must not depend on where it is captured.
        with torch.enable_grad(), plain_forward(model) as in_float32:
            found, report = _captured_batch(captured, given, doubled)
            # The graph to deploy is that without labels; the loss is a graph of its own, beside it.
            if labels and isinstance(found, CapturedModule):
                inputs = batched(*whole) if report.samples == sample_count(doubled) else whole
                _capture_loss(found, model, inputs, labels, shapes)
    finally:
        for module, training in was_training.items():
            module.training = training
    for part in _captured_regions(found):
        part.halfeven_entries = entries_with_labels(model, whole)
    report.in_float32 = in_float32
    report.notes += _lost_hooks(model, found)
    return found, report


def _forget_calls(model: nn.Module) -> None:
    """Put a model in eval mode as if it were new there: its own train() may forget what eval mode keeps of calls."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.train()
    model.eval()
    for parameter, requires_grad in trained:
        parameter.requires_grad = requires_grad


def _check_leave_out(model: nn.Module, leave_out: Sequence[str]) -> None:
    missing = [name for name in leave_out if name not in dict(model.named_modules())]
    if missing:
        raise CaptureError(
            f"leave_out names {', '.join(missing)}, and the model has no such submodule, so nothing would be left out. "
            "Choose from the names that `[name for name, _ in model.named_modules()]` lists."
        )


def _lost_hooks(model: nn.Module, captured: nn.Module) -> tuple[str, ...]:
    """Return a note on the modules with hooks of the user's that do not run in the captured model."""
    found = dict(captured.named_modules())
    hooked = [name for name, module in model.named_modules() if has_own_hooks(module)]
    lost = [name or "(the model itself)" for name in hooked if name in found and not has_own_hooks(found[name])]
    if not lost:
        return ()
    return (
        f"Hooks of the float model do not run in the quantized model: those of {named(lost)}. What they do to the "
        "outputs is part of the graph. To see tensors, register them on the quantized model's layers.",
    )


def _captured_batch(
    captured: Callable[[Inputs], tuple[nn.Module, CaptureReport]], given: Inputs, doubled: Inputs
) -> tuple[nn.Module, CaptureReport]:
    """Capture a model on two samples at least, or on the single sample given where its code fixes the batch."""
    try:
        found, report = captured(doubled)
    except CaptureError:
        if sample_count(given) == sample_count(doubled):
            raise
        return captured(given)  # a model of one sample alone
    if report.fixed_batch and sample_count(given) != sample_count(doubled):
        why = report.fixed_batch  # of a batch of 1 torch.export knows no line
        found, report = captured(given)
        report.fixed_batch = why
    return found, report


def _capture_loss(
    captured: CapturedModule, model: nn.Module, inputs: Inputs, labels: tuple[str, ...], shapes: DynamicShapes
) -> None:
    """Add the loss to a captured model, from captures of the model with labels and without."""
    # Both graphs are traced on the same inputs, but for the labels, so that their common operators can be told.
    plain, _ = without_labels(model, inputs)
    own_shapes = {name: axes for name, axes in shapes.items() if name not in labels}
    free = free_axes(model, *inputs, shapes)
    without = export_program(model, plain, (), export_shapes(free_axes(model, *plain, own_shapes)))[1]
    add_loss(captured, model, without, export_program(model, inputs, (), export_shapes(free))[1], labels)
    check_same(model, captured, inputs, _still_free(captured, free))


def _capture_whole_or_parts(
    model: nn.Module,
    inputs: Inputs,
    leave_out: tuple[str, ...],
    kept: Sequence[KeptInPython] | None,
    dynamic_shapes: DynamicShapes,
    *,
    may_return_others: bool,
) -> tuple[nn.Module, CaptureReport]:
    recorded = record_inputs(model, *inputs)
    free = free_axes(model, *inputs, dynamic_shapes)
    reports: list[CaptureReport] = []
    inner: dict[str, FreeAxes] = {}

    def free_axes_of(name: str) -> FreeAxes:
        if name and not inner:
            # Each needs runs of the model at other sizes, so they are found only where the model is captured in parts.
            inner.update(inner_free_axes(lambda *other: record_inputs(model, *other), recorded, inputs, free))
        if name and name not in inner:
            raise CaptureError("its calls differ in more than the sizes of tensors")
        return inner[name] if name else free

    # The recorded calls are those of submodules; "" is the model itself.
    parts = PartsCapture(model, {**recorded, "": [inputs]}, free_axes_of, leave_out)

    def with_kept(kept: dict[str, KeptInPython]) -> nn.Module:
        reports.append(CaptureReport(kept=tuple(kept.values()), samples=sample_count(inputs)))
        return parts.capture(kept, reports[-1])

    def check(captured: nn.Module) -> None:
        check_same(model, captured, inputs, _still_free(captured, free))

    def alone(module: nn.Module, args: Any, kwargs: Any) -> CapturedModule:
        return export_module(module, (args, kwargs), batch_axes((args, kwargs)))

    # A plan names the modules that stay Python; without it, they are found by a comparison in training mode.
    if kept is not None:
        check(captured := with_kept({k.name: k for k in kept}))
        found = restored_dropouts(captured, model, *inputs)
    else:
        found = capture_as_trained(model, *inputs, Capture(with_kept, check, alone, may_return_others))
        captured = found.model
    report = replace(reports[-1], notes=found.notes, lost_in_attention=found.lost_in_attention)
    # The batch may be fixed in a graph, or only in a file, by the Python code between graphs.
    report.fixed_batch = next((part.fixed_batch for part in _captured_regions(captured) if part.fixed_batch), "")
    free = _still_free(captured, free)
    if not isinstance(captured, CapturedModule) and not report.fixed_batch:
        report.fixed_batch_of_file = reason_of_fixed_batch_between_parts(captured, inputs, free)
    example = two_samples(inputs, [{} for _ in free] if report.fixed_batch_of_file else free)
    for part in _captured_regions(captured):
        part.halfeven_inputs = model_inputs(model, inputs, free)
        part.halfeven_example = example
    return captured, report


def _captured_regions(captured: nn.Module) -> list[CapturedModule]:
    return [module for module in captured.modules() if isinstance(module, CapturedModule)]


def _still_free(captured: nn.Module, free: FreeAxes) -> FreeAxes:
    """Return the free axes without the batch, where the batch is a constant in a part of the model."""
    fixed = any(part.fixed_batch for part in _captured_regions(captured))
    return [{axis: name for axis, name in axes.items() if not (fixed and name == BATCH)} for axes in free]


def two_samples(inputs: Inputs, free: FreeAxes) -> Inputs:
    """Return arguments cut to two samples where the batch is free, on the CPU."""
    leaves, form = pytree.tree_flatten(inputs)
    # The tokens of a sequence that comes first are those of its mask too, at whatever axis: such a size stays.
    elsewhere = {label for axes in free for axis, label in axes.items() if axis}
    for place, axes in enumerate(free):
        if isinstance(leaves[place], Tensor):
            cut = 0 in axes and axes[0] not in elsewhere
            leaves[place] = (leaves[place][:2] if cut else leaves[place]).detach().cpu()
    result: Inputs = pytree.tree_unflatten(leaves, form)
    return result
