"""OpenVINO as the runtime: running a deployed file, and asking it what it executed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfeven.errors import VerificationError
from halfeven.export.openvino import LAYER_TYPES, WEIGHT_SUFFIX
from halfeven.export.telemetry import silently

ACCURACY = {"EXECUTION_MODE_HINT": "ACCURACY"}
"""Without it the plugin computes in bfloat16 what is not integer, and nothing can be compared."""

INTEGER_TYPES = ("u8", "i8", "u4", "i4")


@dataclass(frozen=True)
class Executed:
    """How the runtime executed a layer."""

    layer: str
    precision: str
    kernel: str

    @property
    def integer(self) -> bool:
        """Whether an integer kernel ran."""
        return self.precision in INTEGER_TYPES and "i8" in self.kernel.lower()


@silently()
def read(path: str | Path) -> Any:
    """The `openvino.Model` of a file.

    Raises:
        VerificationError: no such file, or none that OpenVINO can read.
    """
    import openvino

    path = Path(path)
    if not path.is_file():
        raise VerificationError(f"There is no file {path} to run. Write it with halfeven.export(qmodel, path).")
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise VerificationError(
            f"OpenVINO cannot read {path}: {str(error).strip().splitlines()[-1]} The file is damaged or of another "
            f"kind: "
            "write it again with halfeven.export(qmodel, path)."
        ) from error


@silently()
def compile_model(model: Any, config: dict[str, str] | None = None) -> Any:
    """A model ready to run on the CPU, in float32 where it is not integer unless `config` says otherwise."""
    import openvino

    return openvino.Core().compile_model(model, "CPU", ACCURACY if config is None else config)


def load_deployed(path: str | Path) -> Callable[..., Any]:
    """A deployed file as a function from tensors to tensors, on the CPU.

    Args:
        path: an `.xml` or `.onnx` file.

    Returns:
        A function of the model's inputs; it returns one tensor, or a tuple where the model has several outputs.
    """
    compiled = compile_model(read(path))

    def run(*inputs: Tensor) -> Any:
        outputs = run_compiled(compiled, inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def run_compiled(compiled: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All outputs of a compiled model as tensors of their own."""
    result = compiled([np.ascontiguousarray(x.detach().cpu().numpy()) for x in inputs])
    return [torch.from_numpy(np.array(result[i])) for i in range(len(compiled.outputs))]


def request_with(compiled: Any, inputs: Sequence[Tensor]) -> Any:
    """An `openvino.InferRequest` whose inputs are set already: `request.infer()` does nothing but compute."""
    import openvino

    request = compiled.create_infer_request()
    for index, x in enumerate(inputs):
        request.set_input_tensor(index, openvino.Tensor(np.array(x.detach().numpy(), order="C")))
    return request


def with_outputs(model: Any, names: Sequence[str]) -> list[str]:
    """Make the named tensors outputs of a model, after its own; the names of those that it has."""
    found = {name for node in model.get_ordered_ops() for port in node.outputs() for name in port.get_names()}
    present = [name for name in names if name in found]
    for name in present:
        model.add_outputs(name)
    return present


def executed_layers(compiled: Any, layers: Sequence[str]) -> list[Executed]:
    """What the runtime made of each named layer; layers that it does not mention come with precision "unknown"."""
    found: dict[str, Executed] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if info.get("layerType") == "Const":
            continue
        for name in info.get("originalLayersNames", "").split(","):
            found.setdefault(_layer(name), Executed(name, info["runtimePrecision"], info["primitiveType"]))
    return [found.get(layer, Executed(layer, "unknown", "")) for layer in layers]


def stored_integers(model: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """The integer weights that a file holds for the named layers."""
    found: dict[str, Tensor] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in LAYER_TYPES:
            continue
        names = [_layer(node.get_friendly_name())]
        source = node.input_value(1).get_node()
        while source.get_type_name() != "Constant" and source.get_input_size():
            # The ONNX front end names a transposed convolution anew; its weight keeps the name it had.
            names.append(source.get_friendly_name().removesuffix(WEIGHT_SUFFIX))
            source = source.input_value(0).get_node()
        layer = next((name for name in names if name in layers), None)
        if layer and source.get_type_name() == "Constant" and source.get_element_type().is_integral_number():
            found[layer] = torch.from_numpy(np.array(source.get_data()).astype(np.float32))
    return found


def _layer(name: str) -> str:
    """The layer that an operator is part of: the plugin and the ONNX front end add "/DequantizationMultiply" and
    the like."""
    return name.split("/")[0]
