"""Check that a captured model computes what its original does, on the example and at other sizes of its free axes."""

import traceback
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CaptureError
from halfeven.graph.batches import Inputs
from halfeven.graph.dynamic_shapes import FreeAxes
from halfeven.graph.other_sizes import other_sizes
from halfeven.graph.restoring import attributes_restored
from halfeven.graph.torch_private import pytree


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
    """Raise CaptureError unless both models agree in eval mode, on the example and at other sizes of its free axes."""
    captured.eval()
    with torch.no_grad(), attributes_restored(model):
        _check_equal("the example", _output_leaves(model, inputs), _output_leaves(captured, inputs))
        for other in other_sizes(inputs, free):
            try:
                expected = _output_leaves(model, other.inputs)
            except Exception:  # the example itself ran before: this model does not take this size
                continue
            where = f"inputs whose {other.axis_name} is {other.size}"
            try:
                found = _output_leaves(captured, other.inputs)
            except Exception as error:
                raise CaptureError(
                    f"The captured model does not run on {where}, and the original does: {reason_of(error)}\nSo "
                    "capture fixed a shape, and the deployed file would fail there. Leave the submodule out with "
                    "leave_out=[...]."
                ) from error
            _check_equal(where, expected, found)


def _output_leaves(model: nn.Module, inputs: Inputs) -> list[Any]:
    return pytree.tree_leaves(model(*inputs[0], **inputs[1]))


def _check_equal(where: str, expected: list[Any], found: list[Any]) -> None:
    for e, f in zip(expected, found, strict=True):
        if not isinstance(e, Tensor):
            continue
        # Room for the rounding of operators that were expanded or fused; a wrong operator differs by far more.
        if e.shape != f.shape or not torch.allclose(e, f, rtol=1e-4, atol=1e-5, equal_nan=True):
            difference = f"{float((e - f).abs().max()):.3g}" if e.shape == f.shape else f"{f.shape} for {e.shape}"
            raise CaptureError(
                f"The captured model differs from the original on {where} (largest difference {difference}), so its "
                "quantization would prove nothing. Usual causes are a value that is changed in place through a view, "
                "and a shape that capture fixed. Leave the submodule out with leave_out=[...]."
            )
