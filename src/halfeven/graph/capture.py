"""Capture an unchanged model as a graph whose layers are real modules under their own names.

`torch.export` exports the model in eval mode; then `graph.rebuild` puts convolutions, linear layers, normalization and
dropout back as standard modules around the model's own parameters, so that the result has `train()` and `eval()`, the
float model's state dict, and any batch size. Where a model cannot be exported whole, its largest exportable submodules
are, and the rest stays Python.
"""

import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.copying import copy_model
from halfeven.graph.kept_in_python import KeptInPython, kept_markers, relative_to
from halfeven.graph.rebuild import CapturedModule, assemble
from halfeven.graph.restoring import attributes_restored
from halfeven.graph.stochastic_depth import leaf_markers
from halfeven.graph.torch_private import pytree
from halfeven.graph.training_mode import Capture, capture_as_trained
from halfeven.graph.training_run import left_in_eval
from halfeven.graph.view import computes_products

Example = Tensor | tuple[Any, ...] | dict[str, Any]


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
    """What could not be compared."""


def capture(
    model: nn.Module, example: Example, leave_out: Sequence[str] = (), kept: Sequence[KeptInPython] | None = None
) -> tuple[nn.Module, CaptureReport]:
    """Rebuild a model as graph modules that share its parameters.

    Args:
        model: any module; its training mode is restored.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments. The
            first axis of its tensors is the batch and stays free.
        leave_out: names of submodules that shall stay Python, for example `["head"]`.
        kept: the modules whose own code stays Python for training, as an earlier capture reported them; None: they are
            looked for, by a run of both models in training mode.

    Returns:
        The captured model, in eval mode, and the report.

    Raises:
        CaptureError: a name of `leave_out` does not exist, nothing could be captured, or the captured model differs
            from the original in its outputs or in what training does.
    """
    missing = [name for name in leave_out if name not in dict(model.named_modules())]
    if missing:
        raise CaptureError(
            f"leave_out names {', '.join(missing)}, and the model has no such submodule, so nothing would be left out. "
            "Choose from the names that `[name for name, _ in model.named_modules()]` lists."
        )
    args, kwargs = batched(*as_arguments(example))
    reports: list[CaptureReport] = []
    exported: dict[Any, CapturedModule] = {}

    def with_kept(kept: dict[str, KeptInPython]) -> nn.Module:
        reports.append(CaptureReport(kept=tuple(kept.values())))
        return _capture_largest(model, args, kwargs, tuple(leave_out), kept, reports[-1], exported)

    def check(captured: nn.Module) -> None:
        _check_same(model, captured, args, kwargs)

    was_training = {module: module.training for module in model.modules()}
    left_in_eval(model)  # its own train() may forget what eval mode keeps of earlier calls
    model.eval()
    try:
        with torch.enable_grad():  # the graph must not depend on where it is captured
            if kept is not None:
                check(captured := with_kept({k.name: k for k in kept}))
                return captured, reports[-1]
            found = capture_as_trained(model, args, kwargs, Capture(with_kept, check, _export))
    finally:
        for module, training in was_training.items():
            module.training = training
    return found.model, replace(reports[-1], notes=found.notes)


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
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, list | tuple) else ((example,), {})


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a batch.

    Args:
        batch: a tensor, a dict of inputs (its labels are left out), or a sequence whose first item is either.
    """
    if isinstance(batch, list | tuple):
        batch = batch[0]
    if isinstance(batch, dict):
        return (), {key: value for key, value in batch.items() if key not in ("label", "labels")}
    return (batch,), {}


def batched(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with at least two samples: `torch.export` would make a batch size of 1 a constant."""

    def double(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == 1 else x

    result: tuple[Any, Any] = pytree.tree_map(double, (args, kwargs))
    return result


def _capture_largest(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    leave_out: tuple[str, ...],
    kept: dict[str, KeptInPython],
    report: CaptureReport,
    exported: dict[Any, CapturedModule],
) -> nn.Module:
    shells = [k.name for k in kept.values() if not k.whole]
    inputs = _recorded_inputs(model, args, kwargs)
    inputs[""] = (args, kwargs)
    replaced: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        if name in leave_out:
            report.left.append(LeftInPython(name, "left out at your request"))
            return
        prefix = f"{name}." if name else ""
        if not any(called == name or called.startswith(prefix) for called in inputs):
            report.left.append(LeftInPython(name, "the example input does not lead to it"))
            return
        inner = [out for out in (*leave_out, *shells) if out.startswith(prefix)]
        if name in inputs and name not in kept and not inner:
            whole = tuple(relative_to(name, kept))
            try:
                if (name, whole) not in exported:  # what is kept elsewhere does not change this part
                    exported[name, whole] = _export(module, *inputs[name], whole)
                part = exported[name, whole]
            except Exception as error:  # torch.export raises many kinds: each is reported with its line
                report.left.append(LeftInPython(name, _reason(error)))
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


def _recorded_inputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, tuple[Any, Any]]:
    """Return the (positional, keyword) arguments of each submodule's first call, by name."""
    seen: dict[str, tuple[Any, Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for name, module in model.named_modules()
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


def _export(module: nn.Module, args: Any, kwargs: Any, kept: Sequence[str] = ()) -> CapturedModule:
    batch = {x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
    size = max(batch, default=0)

    def free_batch(x: Any) -> Any:
        dynamic = isinstance(x, Tensor) and x.ndim and x.shape[0] == size
        return {0: torch.export.Dim.AUTO} if dynamic else None

    shapes = pytree.tree_map(free_batch, _by_parameter(module, args, kwargs))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fast path of `nn.MultiheadAttention` is a fused kernel, which hides the layers inside of it.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with attributes_restored(module), leaf_markers(module), kept_markers(module, kept) as calls, quiet():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            unlifted = program.module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert isinstance(unlifted, fx.GraphModule)
    result = assemble(module, unlifted, calls)
    result.stays_in_eval = left_in_eval(module)
    return result


def _by_parameter(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _reason(error: Exception) -> str:
    """Return the error's first line and the innermost line of the model's own code in its traceback."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/halfeven/graph/" not in frame.filename
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    return f"{type(error).__name__}: {text[0]}{where}"


def _check_same(model: nn.Module, captured: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise CaptureError unless both models agree in eval mode, on the example and on a batch of another size."""
    captured.eval()

    def another(x: Any) -> Any:
        return torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.ndim else x

    for what, (a, k) in (
        ("the example", (args, kwargs)),
        ("a larger batch", pytree.tree_map(another, (args, kwargs))),
    ):
        with torch.no_grad(), attributes_restored(model):
            try:
                expected = pytree.tree_leaves(model(*a, **k))
            except Exception:  # the example itself ran before: this model accepts no other batch size
                continue
            found = pytree.tree_leaves(captured(*a, **k))
        for e, f in zip(expected, found, strict=True):
            if isinstance(e, Tensor) and not torch.allclose(e, f, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise CaptureError(
                    f"The captured model differs from the original on {what} (largest difference "
                    f"{float((e - f).abs().max()):.3g}), so its quantization would prove nothing. Usual causes are a "
                    "value that is changed in place through a view, and a shape that capture fixed. Leave the "
                    "submodule out with leave_out=[...]."
                )
