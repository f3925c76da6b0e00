"""export: one door for all file formats."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from halfeven.deployment.deployed import deployed
from halfeven.deployment.exported_program import example_of, exported_program
from halfeven.deployment.forms import shape_for
from halfeven.deployment.quantize_op import ExportedQuantizer, with_exported_quantizers
from halfeven.errors import ConfigError, ExportError
from halfeven.placement.insertion import plan_of
from halfeven.quantization.scheme import FLOAT_BITS, parse_bits
from halfeven.runtimes.onnx import writer as onnx
from halfeven.runtimes.openvino import writer as openvino
from halfeven.targets.named import target_named

WRITERS: dict[str, Callable[[torch.export.ExportedProgram, nn.Module, list[ExportedQuantizer], Path], None]] = {
    ".xml": openvino.write,
    ".onnx": onnx.write,
}
"""File ending -> what writes it."""

FORMATS: dict[str, tuple[str, ...]] = {
    "openvino": (".xml", ".onnx"),
    "onnxruntime": (".onnx",),
    "tensorrt": (".onnx",),
}
"""Target -> the endings of the files that it reads, the usual one first."""


def export(qmodel: nn.Module, path: str | Path, target: str | None = None) -> Path:
    """Write a quantized model for its runtime: BatchNorm folded, weights as integers, any batch size.

    Args:
        qmodel: a calibrated model from `prepare` or `load`; it is not changed.
        path: `.xml` for OpenVINO IR (a `.bin` with the weights lies beside it), `.onnx` for ONNX with QuantizeLinear
            and DequantizeLinear, opset 19. The file appears when it is complete.
        target: the runtime; None: the one that the model was made for. Another one runs the same integers as far as
            it has kernels for them; `verify` with the same target says how far that is.

    Returns:
        The path.

    Raises:
        ConfigError: a file ending that the target does not read.
        PlacementError: a target that cannot carry the model's integers.
        CalibrationError: a range is not set yet.
        ExportError: the exporter of the format cannot write an operator of the model.
    """
    path = Path(path)
    target = target_named(target or plan_of(qmodel).options.target).name
    if path.suffix not in FORMATS[target]:
        raise ConfigError(
            f'The file "{path}" ends with "{path.suffix}", and {target} reads no such files. '
            f"Name it with {' or '.join(FORMATS[target])}."
        )
    model, quantizers = exportable(qmodel, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        program = exported_program(model, *example_of(qmodel))
        WRITERS[path.suffix](program, model, quantizers, path)
    except ExportError:
        raise
    except Exception as error:  # tracers and converters raise many kinds; whichever it is, there is no file
        raise ExportError(
            f"{path} could not be written: {type(error).__name__}: {_reason(error)}\n"
            "So the model cannot be deployed in this form. Leave the submodule with that operator out with "
            "leave_out=[...], "
            "or write it with other operators."
        ) from error
    return path


def _reason(error: Exception) -> str:
    """The line of an exporter's message that says what went wrong: the last one, or the first before torch's own
    advice."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if "tlparse" in lines[-1] else lines[-1]


def exportable(qmodel: nn.Module, target: str | None = None) -> tuple[nn.Module, list[ExportedQuantizer]]:
    """The deployed form of a quantized model with its quantizers written as operators, and these in order.

    Args:
        target: the runtime whose form it shall have; None: the one that the model was made for.
    """
    row = target_named(target or plan_of(qmodel).options.target)
    model = deployed(qmodel)
    weights_alone = parse_bits(plan_of(qmodel).options.scheme)[1] == FLOAT_BITS
    exported = with_exported_quantizers(model, clips_integers=row.int32_bias, narrow_weights=weights_alone)
    shape_for(model, exported, row)
    return model, exported
