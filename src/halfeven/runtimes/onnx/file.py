"""ONNX files: opening them, running them in ONNX Runtime, and reading the weights that they hold."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfeven.deployment.quantize_op import WEIGHT_SUFFIX
from halfeven.errors import VerificationError

DISABLED = ["WeightBiasQuantization"]
"""Optimizers that must be off: WeightBiasQuantization quantizes layers that the plan leaves in float."""


def read(path: Path) -> Any:
    """Return the ONNX model of a file.

    Raises:
        VerificationError: there is no such file, or it is incomplete.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise VerificationError(f"There is no file {path} to run. Write it with halfeven.export(qmodel, path).")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise VerificationError(
            f"{path} is not a complete ONNX file: {str(error).strip().splitlines()[-1]} It is incomplete, damaged or "
            "of another format, so it cannot be run. Write it again with halfeven.export(qmodel, path)."
        ) from error
    return model


def session(model: Any, *, optimized: Path | None = None, literal: bool = False) -> Any:
    """Return a session on the CPU whose options keep to the file.

    Args:
        optimized: where the optimized graph is written.
        literal: no optimizer at all: every operator as it is written, in float.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors only: the optimizer warns about things that no user can act on.
    options.log_severity_level = 3
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    # Products of weights alone stay in float32, as far as such layers go.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
        )
    except Exception as error:  # its exceptions have no common class
        raise VerificationError(
            f"ONNX Runtime cannot run the file: {str(error).strip().splitlines()[-1]} Write it again with "
            "halfeven.export(qmodel, path), and report what it says."
        ) from error


class ONNXFile:
    """An ONNX file opened in ONNX Runtime: what is common to all `DeployedFile`s of this format."""

    literal = False
    """No optimizer at all: every operator is evaluated as it is written, in float."""

    def __init__(self, path: Path, tensors: Sequence[str] = ()) -> None:
        import onnx

        self.model = read(path)
        graph = self.model.graph
        self.own_outputs = [output.name for output in graph.output]
        made = {name for node in graph.node for name in node.output}
        self.tensors = [name for name in tensors if name in made]
        asked = onnx.ModelProto()
        asked.CopyFrom(self.model)
        for name in self.tensors:
            if name not in self.own_outputs:
                # The optimizer may rename or remove any tensor that is no output of the graph, so watched tensors
                # become outputs.
                asked.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self.watched = session(asked, literal=self.literal)
        # More outputs than its own keep operators from being fused: this is what users run.
        self.session = self.watched if self.literal or not self.tensors else session(self.model)
        self.inputs = [found.name for found in self.session.get_inputs()]

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        fed = self._fed(inputs)
        outputs = [torch.from_numpy(x) for x in self.session.run(self.own_outputs, fed)]
        tensors = self.watched.run(self.tensors, fed) if self.tensors else []
        return outputs, {name: torch.from_numpy(x) for name, x in zip(self.tensors, tensors, strict=True)}

    def _fed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {name: x.detach().cpu().numpy() for name, x in zip(self.inputs, inputs, strict=True)}

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        return stored_integers(self.model, layers)

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        # Inputs and outputs are bound once, so that a timed call copies nothing from or to Python.
        binding = self.session.io_binding()
        for name, x in self._fed(inputs).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(x))
        for name in self.own_outputs:
            binding.bind_output(name, "cpu")
        return lambda: self.session.run_with_iobinding(binding)


def stored_integers(model: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the integer weights of the named layers, in the order of the model's weights."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    found: dict[str, Tensor] = {}
    for node in model.graph.node:
        layer = node.name.removesuffix(WEIGHT_SUFFIX)
        if layer == node.name or layer not in layers or node.input[0] not in constants:
            continue
        integers = torch.from_numpy(numpy_helper.to_array(constants[node.input[0]]).astype(np.float32))
        reader = readers[node.output[0]]
        # torch's linear weight is [outputs, inputs]. MatMul reads [inputs, outputs], and Gemm does unless transB is
        # set.
        turned = reader.op_type == "MatMul" or (reader.op_type == "Gemm" and not _is_set(reader, "transB"))
        found[layer] = integers.t() if turned and integers.ndim == 2 else integers
    return found


def _is_set(node: Any, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
