"""Capture an unchanged model as a graph whose layers are real modules under their own names.

`torch.export` exports the model in eval mode; then `graph.rebuild` puts convolutions, linear layers, normalization and
dropout back as standard modules around the model's own parameters, so that the result has `train()` and `eval()`, the
float model's state dict, and any batch size. Where a model cannot be exported whole, its largest exportable submodules
are, and the rest stays Python.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.batches import Inputs, batched, own_tensors
from halfeven.graph.copying import copy_model
from halfeven.graph.dynamic_shapes import DynamicShapes, FreeAxes, batch_axes, export_shapes, free_axes
from halfeven.graph.fixed_axes import FixedAxisError, is_batch_fixed, reason_of_fixed_batch, refuse_fixed_axes
from halfeven.graph.inline import inline_grad_blocks, plain_forward
from halfeven.graph.kept_in_python import Calls, KeptInPython, kept_markers, relative_to
from halfeven.graph.labels import add_loss, without_labels
from halfeven.graph.model_inputs import BATCH, model_inputs, region_inputs
from halfeven.graph.other_sizes import inner_free_axes
from halfeven.graph.parts import called_modules
from halfeven.graph.rebuild import CapturedModule, assemble
from halfeven.graph.restoring import attributes_restored
from halfeven.graph.same_outputs import check_same, reason_of
from halfeven.graph.size_relations import size_relations
from halfeven.graph.sized_pools import SizedPools
from halfeven.graph.stochastic_depth import leaf_markers
from halfeven.graph.torch_private import pytree, untracked
from halfeven.graph.training_mode import Capture, capture_as_trained
from halfeven.graph.training_run import left_in_eval
from halfeven.graph.view import computes_products

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class LeftInPython:
    """A submodule that stays Python: its name ("" is the model itself), and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {self.reason}"


@dataclass
class CaptureReport:
    """The names of the captured regions ("" is the whole model), and the submodules that stayed Python."""

    regions: list[str] = field(default_factory=list)
    left: list[LeftInPython] = field(default_factory=list)
    kept: tuple[KeptInPython, ...] = ()
    """Modules whose own code stays Python, because it does something in training alone."""
    notes: tuple[str, ...] = ()
    """Properties that could not be compared, as sentences."""
    fixed_batch: str = ""
    """Why the batch is a constant, with the line of the model's code; "" where it is free."""
    samples: int = 0
    """The batch of the example that was captured."""
    in_float32: list[str] = field(default_factory=list)
    """Lines of the model's code whose blocks of automatic mixed precision were captured in float32."""


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
            first axis of its tensors is the batch and stays free. With labels among them, which the model takes to
            return a loss, the captured model takes labels too, as keyword arguments.
        leave_out: names of submodules that shall stay Python, for example `["head"]`.
        kept: the modules whose own code stays Python for training, as an earlier capture reported them; None: they are
            looked for, by a run of both models in training mode.
        dynamic_shapes: further axes that stay free: input name -> {axis: the axis's name}.

    Returns:
        The captured model, in eval mode, and the report.

    Raises:
        CaptureError: a name of `leave_out` does not exist, nothing could be captured, the model's code makes an axis
            in `dynamic_shapes` a constant, or the captured model differs from the original in its outputs or in what
            training does.
        ConfigError: `dynamic_shapes` names an input or an axis that the model does not have.
    """
    missing = [name for name in leave_out if name not in dict(model.named_modules())]
    if missing:
        raise CaptureError(
            f"leave_out names {', '.join(missing)}, and the model has no such submodule, so nothing would be left out. "
            "Choose from the names that `[name for name, _ in model.named_modules()]` lists."
        )
    whole = own_tensors(model, as_arguments(example))
    given, labels = without_labels(model, whole)
    doubled = batched(*given)
    shapes = dynamic_shapes or {}

    def captured(inputs: Inputs) -> tuple[nn.Module, CaptureReport]:
        own_shapes = {name: axes for name, axes in shapes.items() if name not in labels}
        return _capture_whole_or_parts(model, inputs, tuple(leave_out), kept, own_shapes)

    was_training = {module: module.training for module in model.modules()}
    left_in_eval(model)  # its own train() may forget what eval mode keeps of earlier calls
    model.eval()
    try:
        with (
            torch.enable_grad(),
            plain_forward(model) as in_float32,
        ):  # the graph must not depend on where it is captured
            found, report = _captured_batch(captured, given, doubled)
            if labels and isinstance(found, CapturedModule):
                inputs = batched(*whole) if report.samples == _batch_size(doubled) else whole
                _capture_loss(found, model, inputs, labels, shapes)
    finally:
        for module, training in was_training.items():
            module.training = training
    report.in_float32 = in_float32
    return found, report


def _captured_batch(
    captured: Callable[[Inputs], tuple[nn.Module, CaptureReport]], given: Inputs, doubled: Inputs
) -> tuple[nn.Module, CaptureReport]:
    """Capture a model on two samples at least, or on the single sample given where its code fixes the batch."""
    try:
        found, report = captured(doubled)
    except CaptureError:
        if _batch_size(given) == _batch_size(doubled):
            raise
        return captured(given)  # a model of one sample alone
    if report.fixed_batch and _batch_size(given) != _batch_size(doubled):
        why = report.fixed_batch  # of a batch of 1 torch.export knows no line
        found, report = captured(given)
        report.fixed_batch = why
    return found, report


def _capture_loss(
    captured: CapturedModule, model: nn.Module, inputs: Inputs, labels: tuple[str, ...], shapes: DynamicShapes
) -> None:
    """Add the loss to a captured model, from captures of the model with labels and without."""
    plain, _ = without_labels(model, inputs)
    own_shapes = {name: axes for name, axes in shapes.items() if name not in labels}
    free = free_axes(model, *inputs, shapes)
    without = _export_program(model, plain, (), export_shapes(free_axes(model, *plain, own_shapes)))[1]
    add_loss(captured, model, without, _export_program(model, inputs, (), export_shapes(free))[1], labels)
    check_same(model, captured, inputs, _still_free(captured, free))


def _capture_whole_or_parts(
    model: nn.Module,
    inputs: Inputs,
    leave_out: tuple[str, ...],
    kept: Sequence[KeptInPython] | None,
    dynamic_shapes: DynamicShapes,
) -> tuple[nn.Module, CaptureReport]:
    recorded = _recorded_inputs(model, *inputs)
    free = free_axes(model, *inputs, dynamic_shapes)
    reports: list[CaptureReport] = []
    exported: dict[Any, CapturedModule] = {}
    inner: dict[str, FreeAxes] = {}

    def free_axes_of(name: str) -> FreeAxes:
        if name and not inner:
            inner.update(inner_free_axes(lambda *other: _recorded_inputs(model, *other), recorded, inputs, free))
        return inner[name] if name else free

    def with_kept(kept: dict[str, KeptInPython]) -> nn.Module:
        reports.append(CaptureReport(kept=tuple(kept.values()), samples=_batch_size(inputs)))
        return _capture_largest(model, inputs, recorded, free_axes_of, leave_out, kept, reports[-1], exported)

    def check(captured: nn.Module) -> None:
        check_same(model, captured, inputs, _still_free(captured, free))

    def alone(module: nn.Module, args: Any, kwargs: Any) -> CapturedModule:
        return _export_module(module, (args, kwargs), batch_axes((args, kwargs)))

    if kept is not None:
        check(captured := with_kept({k.name: k for k in kept}))
        report = reports[-1]
    else:
        found = capture_as_trained(model, *inputs, Capture(with_kept, check, alone))
        captured, report = found.model, replace(reports[-1], notes=found.notes)
    report.fixed_batch = next((part.fixed_batch for part in _captured_regions(captured) if part.fixed_batch), "")
    free = _still_free(captured, free)
    for part in _captured_regions(captured):
        part.halfeven_inputs = model_inputs(model, inputs, free)
        part.halfeven_example = two_samples(inputs, free)
    return captured, report


def _captured_regions(captured: nn.Module) -> list[CapturedModule]:
    return [module for module in captured.modules() if isinstance(module, CapturedModule)]


def _still_free(captured: nn.Module, free: FreeAxes) -> FreeAxes:
    """Return the free axes without the batch, where the batch is a constant in a part of the model."""
    fixed = any(part.fixed_batch for part in _captured_regions(captured))
    return [{axis: name for axis, name in axes.items() if not (fixed and name == BATCH)} for axes in free]


def _batch_size(inputs: Inputs) -> int:
    return max((x.shape[0] for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), default=0)


def two_samples(inputs: Inputs, free: FreeAxes) -> Inputs:
    """Return arguments cut to two samples where the batch is free, on the CPU."""
    leaves, form = pytree.tree_flatten(inputs)
    for place, axes in enumerate(free):
        if isinstance(leaves[place], Tensor):
            leaves[place] = (leaves[place][:2] if 0 in axes else leaves[place]).detach().cpu()
    cut: Inputs = pytree.tree_unflatten(leaves, form)
    return cut


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and log lines of `torch.export` about its internals; its errors are raised as usual."""
    chatty = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = chatty.level
    chatty.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.setLevel(level)


def as_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of an example input."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, list | tuple) else ((example,), {})


def _capture_largest(
    model: nn.Module,
    inputs: Inputs,
    recorded: dict[str, list[Inputs]],
    free_axes_of: Callable[[str], FreeAxes],
    leave_out: tuple[str, ...],
    kept: dict[str, KeptInPython],
    report: CaptureReport,
    exported: dict[Any, CapturedModule],
) -> nn.Module:
    shells = [k.name for k in kept.values() if not k.whole]
    recorded = {**recorded, "": [inputs]}
    replaced: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        if name in leave_out:
            report.left.append(LeftInPython(name, "left out at your request"))
            return
        prefix = f"{name}." if name else ""
        if not any(called == name or called.startswith(prefix) for called in recorded):
            report.left.append(LeftInPython(name, "the example input does not lead to it"))
            return
        inner = [out for out in (*leave_out, *shells) if out.startswith(prefix)]
        if name in recorded and name not in kept and not inner:
            whole = tuple(relative_to(name, kept))
            try:
                if (name, whole) not in exported:  # what is kept elsewhere does not change this part
                    exported[name, whole] = _export_module(module, recorded[name][0], free_axes_of(name), name, whole)
                part = exported[name, whole]
            except FixedAxisError:
                raise
            except Exception as error:  # torch.export raises many kinds: each is reported with its line
                report.left.append(LeftInPython(name, reason_of(error)))
            else:
                # Python may read the parts of one without products, which gains nothing as a graph.
                if not shells or computes_products(part.graph):
                    replaced[name] = part
                    report.regions.append(name)
                return
        for child_name, child in module.named_children():
            if any(True for _ in child.parameters()):
                visit(child, prefix + child_name)

    visit(model, "")
    if not replaced:
        reasons = "\n  ".join(str(reason) for reason in (*report.left, *report.kept))
        raise CaptureError(
            "No part of the model could be captured, so no part of it can be quantized. These were tried:\n  "
            f"{reasons}\nMend the named lines, or leave those submodules out with leave_out=[...]."
        )
    if "" in replaced:
        return replaced[""]
    # The remaining Python code runs on a copy of the model, whose memo makes it share the original's parameters.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    shell = copy_model(model, memo)
    for name, module in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(shell.get_submodule(parent), attribute, module)
    return shell


def _recorded_inputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, list[Inputs]]:
    """Return the (positional, keyword) arguments of each submodule's calls, by name; after the first, shapes alone."""
    seen: dict[str, list[Inputs]] = {}

    def see(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        call = (args, kwargs)
        if name in seen:
            call = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), call)
        seen.setdefault(name, []).append(call)

    handles = [
        module.register_forward_pre_hook(partial(see, name=name), with_kwargs=True)
        for name, module in called_modules(model)
        if name
    ]
    try:
        with torch.no_grad(), attributes_restored(model):
            model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"The model does not run on the example input, so it cannot be captured: {error}\nPass an example that "
            "`model(...)` takes: a tensor, a tuple of positional arguments or a dict of keyword arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _export_module(
    module: nn.Module, inputs: Inputs, free: FreeAxes, name: str = "", kept: Sequence[str] = ()
) -> CapturedModule:
    described = model_inputs(module, inputs, free)
    export = partial(_export_program, module, inputs, kept)
    try:
        program, unlifted, calls = export(export_shapes(free))
    except Exception as error:
        refuse_fixed_axes(error, described, name, export, free)
        raise
    result = assemble(module, unlifted, calls)
    result.stays_in_eval = left_in_eval(module)
    result.region_name = name
    result.region_inputs = region_inputs(result.graph, described)
    result.size_relations = size_relations(program, result.region_inputs)
    if is_batch_fixed(described, result.region_inputs):
        result.fixed_batch = reason_of_fixed_batch(export, free)
    return result


def _export_program(
    module: nn.Module,
    inputs: Inputs,
    kept: Sequence[str],
    shapes: list[Any],
    watching: AbstractContextManager[Any] | None = None,
) -> tuple[torch.export.ExportedProgram, fx.GraphModule, Calls]:
    """Return the program that `torch.export` makes of a module, its graph, and the traced calls of kept modules.

    Args:
        module: the module.
        inputs: its arguments.
        kept: paths of the modules that are kept in Python.
        shapes: what `torch.export` is told of each of their leaves.
        watching: a context for `torch.export` to run in.
    """
    args, kwargs = inputs
    given = pytree.tree_unflatten(shapes, pytree.tree_structure(inputs))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fast path of `nn.MultiheadAttention` is a fused kernel, which hides the layers inside of it.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with attributes_restored(module), leaf_markers(module), kept_markers(module, kept) as calls, quiet():
            with SizedPools(), watching or nullcontext():
                program = torch.export.export(
                    module, args, kwargs, dynamic_shapes=_by_parameter(module, *given), strict=False
                )
            unlifted = program.module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert isinstance(unlifted, fx.GraphModule)
    inline_grad_blocks(unlifted)
    return untracked(program), unlifted, calls


def _by_parameter(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
