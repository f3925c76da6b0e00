"""ONNX Runtime: running a deployed file on the CPU, and reading from the optimized graph what it executed."""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halfeven.deployment.quantize_op import WEIGHT_SUFFIX
from halfeven.errors import VerificationError
from halfeven.runtimes.layer_execution import Executed
from halfeven.runtimes.onnx.writer import OPSET, translated

DISABLED = ["WeightBiasQuantization"]
"""Optimizers that must be off: this one quantizes layers that the plan leaves in float."""

INTEGER_PRODUCTS = ("QLinearMatMul", "MatMulIntegerToFloat")
INTEGER_KERNELS = ("QLinearConv", "QGemm", *INTEGER_PRODUCTS)
WEIGHTS_ALONE = ("MatMulNBits",)
"""Kernels that read integer weights and compute in float."""
FLOAT_PRODUCTS = ("MatMul", "FusedMatMul")


def read(path: Path) -> Any:
    """The ONNX model of a file.

    Raises:
        VerificationError: no such file, or none that is whole.
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
            f"{path} is no whole ONNX file: {str(error).strip().splitlines()[-1]} It is damaged or of another kind: "
            "write it again with halfeven.export(qmodel, path)."
        ) from error
    return model


def session(model: Any, *, optimized: Path | None = None, literal: bool = False) -> Any:
    """A session on the CPU with the options that keep what the file says.

    Args:
        optimized: where the optimized graph is written.
        literal: no optimizer at all: every operator as it is written, in float.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
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


def function_of(program: torch.export.ExportedProgram) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]:
    """A program without quantizers as a function that the runtime computes, of its inputs and of its constants by name;
    the first output."""
    import onnx

    model = translated(program, [])
    graph = model.graph
    own = [found.name for found in graph.input]
    constants = [tensor.name for tensor in graph.initializer]
    for tensor in graph.initializer:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del graph.initializer[:]
    opened = session(model)

    def run(inputs: Sequence[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        given = dict(zip(own, inputs, strict=True)) | {name: state[name] for name in constants}
        return torch.from_numpy(opened.run(None, {name: x.detach().numpy() for name, x in given.items()})[0])

    return run


class OnGrid(Protocol):
    """Where integers stand."""

    @property
    def scale(self) -> Tensor: ...

    @property
    def zero_point(self) -> Tensor: ...

    @property
    def first(self) -> int:
        """Smallest integer of the type."""
        ...


def softmax_of_integers(x: Tensor, axis: int, before: OnGrid, after: OnGrid) -> Tensor:
    """What the runtime makes of integers that are dequantized, put through a softmax over an axis and quantized: for
    this it has a kernel of its own, where both are of one type."""
    import onnx
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
    from onnx.numpy_helper import from_array

    constants, types = [], []
    for name, grid in (("before", before), ("after", after)):
        kind = np.dtype(np.int8 if grid.first else np.uint8)
        constants.append(from_array(grid.scale.numpy().astype(np.float32).reshape(()), f"{name}_scale"))
        constants.append(from_array(grid.zero_point.numpy().astype(kind).reshape(()), f"{name}_zero_point"))
        types.append(onnx.helper.np_dtype_to_tensor_dtype(kind))
    nodes = [
        make_node("DequantizeLinear", ["x", "before_scale", "before_zero_point"], ["real"]),
        make_node("Softmax", ["real"], ["shares"], axis=axis),
        make_node("QuantizeLinear", ["shares", "after_scale", "after_zero_point"], ["y"]),
    ]
    ends = [make_tensor_value_info(name, kind, x.shape) for name, kind in zip("xy", types, strict=True)]
    graph = make_graph(nodes, "softmax", ends[:1], ends[1:], constants)
    model = make_model(graph, opset_imports=[make_opsetid("", OPSET)])
    integers = x.numpy().astype(np.int8 if before.first else np.uint8)
    return torch.from_numpy(session(model).run(None, {"x": integers})[0].astype(np.float32))


class ONNXRuntimeFile:
    """A file opened in ONNX Runtime; see `halfeven.runtimes.runtime.DeployedFile`."""

    runtime = "ONNX Runtime"
    literal = False

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

    def _optimized(self) -> Iterator[Any]:
        """The operators of the graph as the runtime executes it."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            session(self.model, optimized=path)
            yield from onnx.load(path).graph.node

    def executed_layers(self, layers: Sequence[str]) -> list[Executed]:
        found = {}
        for node in self._optimized():
            name = re.sub(r"_token_\d+$", "", node.name)
            if name in layers and node.op_type != "DequantizeLinear":
                found[name] = _described(name, node)
        return [found.get(layer, Executed(layer, "unknown", "", integer=False)) for layer in layers]

    def executed_products(self) -> list[Executed]:
        weights = {tensor.name for tensor in self.model.graph.initializer}
        nodes = [node for node in self._optimized() if node.op_type in (*INTEGER_PRODUCTS, *FLOAT_PRODUCTS)]
        return [_described(node.name, node) for node in nodes if not weights.intersection(_operands(node))]

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        return stored_integers(self.model, layers)

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        binding = self.session.io_binding()
        for name, x in self._fed(inputs).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(x))
        for name in self.own_outputs:
            binding.bind_output(name, "cpu")
        return lambda: self.session.run_with_iobinding(binding)


def _operands(node: Any) -> tuple[str, str]:
    """The two tensors that a product multiplies: scales and zero points stand between them in some operators."""
    second = 3 if node.op_type == "QLinearMatMul" else 1
    return node.input[0], node.input[second]


def _described(name: str, node: Any) -> Executed:
    integer, stored = node.op_type in INTEGER_KERNELS, node.op_type in WEIGHTS_ALONE
    return Executed(name, "int8" if integer else "float32", node.op_type, integer=integer, stored=integer or stored)


def stored_integers(model: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """The integer weights of the named layers, in the order of the model's."""
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
        turned = reader.op_type == "MatMul" or (reader.op_type == "Gemm" and not _is_set(reader, "transB"))
        found[layer] = integers.t() if turned and integers.ndim == 2 else integers
    return found


def _is_set(node: Any, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)


class TensorRTFile(ONNXRuntimeFile):
    """A file for TensorRT, which is not run here: its operators are evaluated as they are written, in float.

    A layer counts as integer where both its input and its weight come from symmetric 8-bit pairs, the pattern that
    TensorRT's documentation names.
    """

    runtime = "ONNX's own semantics (TensorRT itself was not run)"
    literal = True

    def executed_layers(self, layers: Sequence[str]) -> list[Executed]:
        found = {node.name: node for node in self.model.graph.node if node.name in layers}
        return [self._planned(layer, found.get(layer)) for layer in layers]

    def executed_products(self) -> list[Executed]:
        nodes = [node for node in self.model.graph.node if node.op_type == "MatMul" and not self._weighted(node)]
        return [self._planned(node.name, node) for node in nodes]

    def _planned(self, layer: str, node: Any) -> Executed:
        if node is None:
            return Executed(layer, "unknown", "", integer=False)
        integer = all(self._pair(name) is not None for name in node.input[:2])
        return Executed(layer, "int8" if integer else "float32", f"{node.op_type}, not run", integer=integer)

    def _weighted(self, node: Any) -> bool:
        pair = self._pair(node.input[1])
        return pair is not None and pair.name.endswith(WEIGHT_SUFFIX)

    def _pair(self, name: str) -> Any:
        """The DequantizeLinear that a tensor comes from, through operators that commute with it, or None."""
        makers = {output: node for node in self.model.graph.node for output in node.output}
        node = makers.get(name)
        while node is not None and node.op_type in COMMUTING:
            node = makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None


COMMUTING = frozenset(
    (
        *("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand"),
        *("Slice", "Split", "MaxPool", "Gather", "Concat"),
    )
)
"""Operators that commute with a quantizer, so that a pair before them serves the layer behind them."""
