"""ONNX Runtime: running a deployed file on the CPU, and reading from the optimized graph what it executed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halfeven.runtimes.layer_execution import KernelTime, LayerExecution
from halfeven.runtimes.onnx.file import ONNXFile, session
from halfeven.runtimes.onnx.writer import OPSET, translated
from halfeven.runtimes.onnxruntime import profile
from halfeven.runtimes.onnxruntime.activations import TRANSLATIONS
from halfeven.runtimes.onnxruntime.writer import unpacked_blocks
from halfeven.temporary import temporary_folder

INTEGER_PRODUCTS = ("QLinearMatMul", "MatMulIntegerToFloat")
INTEGER_KERNELS = ("QLinearConv", "QGemm", *INTEGER_PRODUCTS)
WEIGHTS_ALONE = ("MatMulNBits",)
"""Kernels that read integer weights and compute in float."""
FLOAT_PRODUCTS = ("MatMul", "FusedMatMul")


def function_of(program: torch.export.ExportedProgram) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]:
    """Return the first output of a program without quantizers as a function, which the runtime computes, of its inputs
    and of its constants by name."""
    import onnx
    import onnx_ir

    model = onnx_ir.to_proto(translated(program, [], TRANSLATIONS))
    graph = model.graph
    own = [found.name for found in graph.input]
    # Constants become inputs, so that operators share a session that differ in them alone.
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
    """The grid of a tensor of integers."""

    @property
    def scale(self) -> Tensor: ...

    @property
    def zero_point(self) -> Tensor: ...

    @property
    def first(self) -> int:
        """Smallest integer of the type."""
        ...


def softmax_of_integers(x: Tensor, axis: int, before: OnGrid, after: OnGrid) -> Tensor:
    """Return the runtime's softmax of integers over an axis, quantized.

    The runtime has a kernel for it, where the integers before and after are of the same type.
    """
    import onnx
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
    from onnx.numpy_helper import from_array

    constants = []
    types = []
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


class ONNXRuntimeFile(ONNXFile):
    """A file opened in ONNX Runtime, optimized as for users; see `halfeven.runtimes.runtime.DeployedFile`."""

    runtime = "ONNX Runtime"

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        return super().stored_integers(layers) | self._stored_blocks(layers)

    def _stored_blocks(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the integer weights of products of weights alone."""
        from onnx import helper, numpy_helper

        constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        found = {}
        for node in self.model.graph.node:
            if node.op_type in WEIGHTS_ALONE and node.name in layers:
                packed = numpy_helper.to_array(constants[node.input[1]], str(self.path.parent))
                given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
                integers = unpacked_blocks(packed, given["bits"], given["K"])
                found[node.name] = torch.from_numpy(integers.astype(np.float32))
        return found

    def _optimized(self) -> Iterator[Any]:
        """Yield the operators of the graph as the runtime executes it."""
        import onnx

        with temporary_folder() as folder:
            path = folder / "optimized.onnx"
            session(self.model, folder=self.path.parent, optimized=path, settings=self.settings)
            yield from onnx.load(path, load_external_data=False).graph.node

    def executed_layers(self, layers: Sequence[str]) -> list[LayerExecution]:
        found = {}
        for node in self._optimized():
            name = profile.name_in_file(node.name)
            if name in layers and node.op_type != "DequantizeLinear":
                found[name] = _described(name, node)
        return [found.get(layer, LayerExecution(layer, "unknown", "", integer=False)) for layer in layers]

    def executed_products(self) -> list[LayerExecution]:
        weights = {tensor.name for tensor in self.model.graph.initializer}
        # A product with a constant is a layer's.
        nodes = [node for node in self._optimized() if node.op_type in (*INTEGER_PRODUCTS, *FLOAT_PRODUCTS)]
        return [_described(node.name, node) for node in nodes if not weights.intersection(_operands(node))]

    def kernel_times(self, inputs: Sequence[Tensor], runs: int = 10) -> list[KernelTime]:
        def profiled(path: Path) -> Any:
            return session(self.model, folder=self.path.parent, profile=path, settings=self.settings)

        return profile.kernel_times(profiled, self._fed(inputs), runs, INTEGER_KERNELS)


def _operands(node: Any) -> tuple[str, str]:
    """Return the two factors of a product; scales and zero points stand between them in some operators."""
    second = 3 if node.op_type == "QLinearMatMul" else 1
    return node.input[0], node.input[second]


def _described(name: str, node: Any) -> LayerExecution:
    integer = node.op_type in INTEGER_KERNELS
    stored = integer or node.op_type in WEIGHTS_ALONE
    return LayerExecution(name, "int8" if integer else "float32", node.op_type, integer=integer, stored=stored)
