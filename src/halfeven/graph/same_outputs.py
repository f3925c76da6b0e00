"""Check that a captured model computes what its original does, on the example and at other sizes of its free axes."""

import traceback
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CaptureError, InputError
from halfeven.graph.batches import Inputs
from halfeven.graph.dynamic_shapes import FreeAxes
from halfeven.graph.other_sizes import other_sizes
from halfeven.graph.restoring import same_random_numbers, state_restored
from halfeven.graph.torch_private import pytree
from halfeven.graph.training_run import map_tensors


def reason_of(error: Exception) -> str:
    """Return the error's first line and the innermost line of the model's own code in its traceback."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/halfeven/graph/" not in frame.filename
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    return f"{type(error).__name__}: {text[0]}{where}"


def check_same(model: nn.Module, captured: nn.Module, inputs: Inputs, free: FreeAxes) -> None:
    """Raise CaptureError unless both models agree in eval mode, on the example and at other sizes of its free axes.

    Each call gets inputs of its own, which it may change, the same random numbers, and the state that was there before.
    """
    captured.eval()
    with torch.no_grad():
        expected = _outputs(model, inputs)
        found = _outputs(captured, inputs)
        if not _are_equal(expected, found):
            _refuse_unrepeatable(expected, _outputs(model, inputs))
            raise _difference_error("the example", expected, found)
        _check_second_call(model, captured, inputs, expected)
        for other in other_sizes(inputs, free):
            try:
                expected = _outputs(model, other.inputs)
            except Exception:  # the example itself ran before: this model does not take this size
                continue
            where = f"inputs whose {other.axis_name} is {other.size}"
            try:
                found = _outputs(captured, other.inputs)
            except InputError as error:
                raise CaptureError(
                    f"The captured model does not run on {where}, and the original does: {error}\nA file would not "
                    "check that. Give an example of sizes that need all of the code (those that it pads, where it pads "
                    "`if size % window`), compute without the decision, or leave the axis out of dynamic_shapes."
                ) from error
            except Exception as error:
                raise CaptureError(
                    f"The captured model does not run on {where}, and the original does: {reason_of(error)}\nSo "
                    "capture fixed a shape, and the deployed file would fail there. Leave the submodule out with "
                    "leave_out=[...]."
                ) from error
            if not _are_equal(expected, found):
                raise _difference_error(where, expected, found)


def _outputs(model: nn.Module, inputs: Inputs, calls: int = 1) -> list[Any]:
    """Return the leaves of a model's outputs in the last of several equal calls."""
    outputs = None
    with state_restored(model):
        for _ in range(calls):
            args, kwargs = map_tensors(Tensor.clone, inputs)
            with same_random_numbers():
                outputs = model(*args, **kwargs)
    return pytree.tree_leaves(outputs)


def _refuse_unrepeatable(expected: list[Any], again: list[Any]) -> None:
    if not _are_equal(expected, again):
        raise CaptureError(
            "In eval mode the model gives other results each time, for the same inputs and the same random numbers, so "
            "it cannot be compared with what was captured. Take what varies (a clock, numbers from elsewhere) out of "
            "its forward, or leave the submodule out with leave_out=[...]."
        )


def _check_second_call(model: nn.Module, captured: nn.Module, inputs: Inputs, first: list[Any]) -> None:
    """Raise CaptureError for a model whose results depend on earlier calls, unless the captured model's do too."""
    second = _outputs(model, inputs, calls=2)
    if not _are_equal(first, second) and not _are_equal(second, _outputs(captured, inputs, calls=2)):
        raise CaptureError(
            "In eval mode the model remembers earlier calls: the second call with the same inputs gives other results "
            "than the first. A graph and a file remember nothing, so they would compute something else. Make the state "
            "(a cache, hidden values, frames) an input and an output of forward, or leave the submodule that keeps it "
            "out with leave_out=[...]."
        )


def _are_equal(expected: list[Any], found: list[Any]) -> bool:
    pairs = zip(expected, found, strict=True)
    return all(_is_equal(e, f) for e, f in pairs if isinstance(e, Tensor) and isinstance(f, Tensor))


def _is_equal(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, found)
    # Room for the rounding of operators that were expanded or fused; a wrong operator differs by far more.
    largest = float(torch.nan_to_num(expected.abs(), posinf=0.0).max()) if expected.numel() else 0.0
    return torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * max(1.0, largest), equal_nan=True)


def _difference_error(where: str, expected: list[Any], found: list[Any]) -> CaptureError:
    pairs = [(e, f) for e, f in zip(expected, found, strict=True) if isinstance(e, Tensor)]
    e, f = next(pair for pair in pairs if not _is_equal(*pair))
    difference = f"{f.shape} for {e.shape}"
    if e.shape == f.shape:
        wide = torch.complex128 if e.is_complex() else torch.float64  # booleans cannot be subtracted
        difference = f"{float((e.to(wide) - f.to(wide)).abs().max()):.3g}"
    return CaptureError(
        f"The captured model differs from the original on {where} (largest difference {difference}), so its "
        "quantization would prove nothing. Usual causes are a value that is changed in place through a view, "
        "and a shape that capture fixed. Leave the submodule out with leave_out=[...]."
    )
