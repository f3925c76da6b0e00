"""Write a quantized model for its runtime, in any of the formats that it reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.deployment.exported_program import example_of, program_of
from halfeven.deployment.file_interface import FLOAT_PRECISION, FloatPrecision, facts_of, interface_of
from halfeven.errors import ExportError, HalfevenError, last_line
from halfeven.files import storage_error
from halfeven.graph.inline import without_autocast
from halfeven.graph.torch_private import forgetting_graphs
from halfeven.graph.wrappers import unwrapped
from halfeven.placement.insertion import plan_of, recorded_inputs
from halfeven.progress_bar import progress
from halfeven.runtimes.deploy import deploy, runtime_of
from halfeven.runtimes.runtime import Runtime


@checked_arguments(ExportError)
def export(
    qmodel: nn.Module,
    path: str | Path,
    target: str | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    float_precision: FloatPrecision = "f32",
) -> Path:
    """Write a quantized model for its runtime: BatchNorm folded, weights as integers, any batch size.

    Args:
        qmodel: a calibrated model from `prepare` or `load`; it is not changed.
        path: `.xml` for OpenVINO IR (a `.bin` with the weights lies beside it), `.onnx` for ONNX with QuantizeLinear
            and DequantizeLinear, opset 19. The file appears when it is complete.
        target: the runtime; None: the one that the model was made for. Another one runs the same integers as far as
            it has kernels for them; `verify` with the same target says how far that is.
        input_names: names of the file's inputs, in their order; None: those of the model's forward.
        output_names: names of the file's outputs, in their order; None: the keys or fields of the model's outputs,
            "output" for a single tensor, and "output_0", "output_1" for a tuple.
        metadata: facts to write into the file besides halfeven's version, the scheme, the target and the settings that
            its session needs: how inputs are normalized, for example.
        float_precision: precision of the operators that stay float. "f32": float32, as simulated; the session needs the
            settings that the file lists. "runtime": what the runtime chooses, such as bfloat16 in OpenVINO where the
            processor has it; TensorRT's file has float16 for all that is not quantized, scales included.

    Returns:
        The path.

    Raises:
        ConfigError: a file ending that the target does not read, names that are too many, too few or equal, `metadata`
            that halfeven writes itself, or a `float_precision` that the runtime does not have.
        PlacementError: a target that cannot carry the model's integers, or that gains nothing by its quantized gates.
        CalibrationError: a range is not set yet.
        ExportError: the exporter of the format cannot write an operator of the model.
        StorageError: the disk cannot take the file; a file that was there is whole still.
    """
    path = Path(path)
    qmodel = unwrapped(qmodel)
    runtime = runtime_of(qmodel, target)
    runtime.check_ending(path)
    settings = runtime.settings_for(float_precision)
    facts = facts_of(plan_of(qmodel).options.scheme, runtime.name, float_precision, settings, metadata or {})
    try:
        with progress(f"Writing {path.name}"):
            _write(qmodel, path, runtime, input_names, output_names, facts)
    except HalfevenError:
        raise
    except OSError as error:
        raise storage_error(error) from error
    except Exception as error:  # tracers and converters raise many kinds; whichever it is, there is no file
        raise ExportError(
            f"{path} could not be written: {type(error).__name__}: {_reason(error)}\n"
            "So the model cannot be deployed in this form. Leave the submodule with that operator out with "
            "leave_out=[...], or write it with other operators."
        ) from error
    return path


@without_autocast()  # converters trace too
@forgetting_graphs()
def _write(
    qmodel: nn.Module,
    path: Path,
    runtime: Runtime,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    facts: Mapping[str, str],
) -> None:
    deployed = deploy(qmodel, runtime)
    if facts[FLOAT_PRECISION] == "runtime" and runtime.round_to_file is not None:
        # Before the program is made, whose constants are those of the file.
        runtime.round_to_file(deployed)
    described = recorded_inputs(qmodel)
    program = program_of(deployed.model, example_of(qmodel), described)
    interface = interface_of(program, described, input_names=input_names, output_names=output_names, metadata=facts)
    runtime.writers[path.suffix](program, dataclasses.replace(deployed, interface=interface), path)


def _reason(error: Exception) -> str:
    """Return the line of an exporter's message that tells the reason: that of the error behind all others."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    return last_line(error)
