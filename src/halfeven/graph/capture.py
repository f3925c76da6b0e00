"""Capture: an unchanged model becomes a graph whose layers are real modules under their own names.

The model is exported in eval mode by `torch.export`; then convolutions, linear layers, normalization and dropout are
put back as standard modules around the model's own parameters (`graph.restoration`), so that the result has `train()`
and `eval()`, the float model's state dict, and any batch size. Where a model cannot be exported whole, its largest
exportable submodules are, and the rest stays Python.
"""

import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.rebuild import assemble, leaf_markers
from halfeven.graph.torch_private import pytree

Example = Tensor | tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class LeftInPython:
    """A submodule that stays Python: its name ("" is the model itself), and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {self.reason}"


@dataclass
class CaptureReport:
    """What was captured: the names of the regions ("" is the whole model), and what stayed Python."""

    regions: list[str] = field(default_factory=list)
    left: list[LeftInPython] = field(default_factory=list)


def capture(model: nn.Module, example: Example, leave_out: Sequence[str] = ()) -> tuple[nn.Module, CaptureReport]:
    """Rebuild a model as graph modules that share its parameters.

    Args:
        model: any module; it is left in the mode it was in.
        example: one input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments. The
            first axis of its tensors is the batch and stays free.
        leave_out: names of submodules that shall stay Python, for example `["head"]`.

    Returns:
        The captured model, in eval mode, and the report.

    Raises:
        CaptureError: a name of `leave_out` does not exist, nothing could be captured, or the captured model computes
            something else than the original.
    """
    missing = [name for name in leave_out if name not in dict(model.named_modules())]
    if missing:
        raise CaptureError(
            f"leave_out names {', '.join(missing)}, and the model has no such submodule. "
            "Print `[name for name, _ in model.named_modules()]` for the names there are."
        )
    args, kwargs = batched(*as_arguments(example))
    report = CaptureReport()
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        captured = _capture_largest(model, args, kwargs, tuple(leave_out), report)
        _check_same(model, captured, args, kwargs)
    finally:
        for module, training in was_training.items():
            module.training = training
    return captured, report


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export says of its own inner life; its errors are raised all the same."""
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
    """Positional and keyword arguments of an example input."""
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, list | tuple) else ((example,), {})


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch: a tensor, a dict of inputs, or a sequence whose first item is one
    of these."""
    if isinstance(batch, list | tuple):
        batch = batch[0]
    if isinstance(batch, dict):
        return (), {key: value for key, value in batch.items() if key not in ("label", "labels")}
    return (batch,), {}


def batched(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with at least two samples: torch.export takes a batch of one for a constant."""

    def double(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == 1 else x

    result: tuple[Any, Any] = pytree.tree_map(double, (args, kwargs))
    return result


def _capture_largest(
    model: nn.Module, args: Any, kwargs: Any, leave_out: tuple[str, ...], report: CaptureReport
) -> nn.Module:
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
        if name in inputs and not any(out.startswith(prefix) for out in leave_out):
            try:
                replaced[name] = _export(module, *inputs[name])
            except Exception as error:  # torch.export raises many kinds: each is reported with its line
                report.left.append(LeftInPython(name, _reason(error)))
            else:
                report.regions.append(name)
                return
        for child_name, child in module.named_children():
            if any(True for _ in child.parameters()):
                visit(child, prefix + child_name)

    visit(model, "")
    if not replaced:
        reasons = "\n  ".join(str(left) for left in report.left)
        raise CaptureError(
            "Nothing of the model could be captured, so nothing of it can be quantized. What was tried:\n  "
            f"{reasons}\nMend the named lines, or leave those submodules out with leave_out=[...]."
        )
    if "" in replaced:
        return replaced[""]
    # The Python that stays runs on a copy whose parameters are the originals' own.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    shell = copy.deepcopy(model, memo)
    for name, module in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(shell.get_submodule(parent), attribute, module)
    return shell


def _recorded_inputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, tuple[Any, Any]]:
    """The arguments of each submodule's first call."""
    seen: dict[str, tuple[Any, Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"The model does not run on the example input: {error}\nPass an example that `model(...)` takes: a "
            f"tensor, a "
            "tuple of positional arguments or a dict of keyword arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _export(module: nn.Module, args: Any, kwargs: Any) -> fx.GraphModule:
    batch = {x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
    size = max(batch, default=0)

    def free_batch(x: Any) -> Any:
        dynamic = isinstance(x, Tensor) and x.ndim and x.shape[0] == size
        return {0: torch.export.Dim.AUTO} if dynamic else None

    shapes = pytree.tree_map(free_batch, _by_parameter(module, args, kwargs))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides the attention's layers
    try:
        with leaf_markers(module), quiet():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            unlifted = program.module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert isinstance(unlifted, fx.GraphModule)
    return assemble(module, unlifted)


def _by_parameter(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _reason(error: Exception) -> str:
    """The error's first line, and the last line of the model's own code on its way."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/halfeven/graph/" not in frame.filename
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    return f"{type(error).__name__}: {text[0]}{where}"


def _check_same(model: nn.Module, captured: nn.Module, args: Any, kwargs: Any) -> None:
    """Both models compute the same in eval mode, on the example and on a batch of another size."""
    captured.eval()

    def another(x: Any) -> Any:
        return torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.ndim else x

    for what, (a, k) in (
        ("the example", (args, kwargs)),
        ("a larger batch", pytree.tree_map(another, (args, kwargs))),
    ):
        with torch.no_grad():
            try:
                expected = pytree.tree_leaves(model(*a, **k))
            except Exception:  # the example ran before: it is the model itself that takes no other batch size
                continue
            found = pytree.tree_leaves(captured(*a, **k))
        for e, f in zip(expected, found, strict=True):
            if isinstance(e, Tensor) and not torch.allclose(e, f, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise CaptureError(
                    f"The captured model computes something else than the original on {what} (largest difference "
                    f"{float((e - f).abs().max()):.3g}), so its quantization would prove nothing. A value that is "
                    "changed in place through a view, or a shape fixed at capture, does this: leave the "
                    "submodule out with leave_out=[...]."
                )
