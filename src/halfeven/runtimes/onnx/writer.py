"""ONNX: QuantizeLinear and DequantizeLinear at opset 19, weights as int8 initializers."""

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from halfeven.deployment.deployed import Deployed, Int32Bias
from halfeven.deployment.quantize_op import PER_TENSOR, WEIGHT_SUFFIX, ExportedQuantizer

OPSET = 19
"""The oldest opset with all that 8 bits need; 21 and later trip ONNX Runtime on signed activations (its issue
25526)."""

FOUR_BITS_OPSET = 21
"""The oldest opset with 4-bit integers, for weights alone: no activation is quantized there."""

WHOLE_RANGES = ((0, 255), (-128, 127), (-127, 127), (-7, 7))
"""Grids whose integers need no clip of their own: QuantizeLinear saturates, and narrow ones are those of weights, which
lie on them."""

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def write(program: torch.export.ExportedProgram, deployed: Deployed, path: Path) -> None:
    """Write the program of a deployed model as one ONNX file with a free batch size."""
    import onnx

    proto = translated(program, deployed.quantizers)
    _Graph(proto.graph, deployed).name_and_fold()
    for described in (*proto.graph.node, *proto.graph.initializer, *proto.graph.value_info, proto.graph, proto):
        del described.metadata_props[:]  # the tracer's notes, a quarter of a small file
    _describe_alone(proto.graph, _skip_connections(proto.graph))
    onnx.checker.check_model(proto, full_check=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".onnx")
    os.close(handle)
    try:
        onnx.save(proto, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _skip_connections(graph: Any) -> set[str]:
    """The two tensors of each sum that a normalization reads: ONNX Runtime computes both in one kernel where it knows
    their shapes, which it cannot infer behind a reshape."""
    makers = {output: node for node in graph.node for output in node.output}
    sums = [makers.get(node.input[0]) for node in graph.node if node.op_type == "LayerNormalization"]
    return {name for node in sums if node is not None and node.op_type == "Add" for name in node.input}


def _describe_alone(graph: Any, names: set[str]) -> None:
    """Leave the shapes of the named tensors in the file, and of no others."""
    kept = [described for described in graph.value_info if described.name in names]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def translated(program: torch.export.ExportedProgram, quantizers: list[ExportedQuantizer]) -> Any:
    """A program as an ONNX model, operator by operator; `quantizers` are those whose operators it has."""
    weights_alone = bool(quantizers) and all(quantizer.weight for quantizer in quantizers)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=FOUR_BITS_OPSET if any(map(four_bits, quantizers)) else OPSET,
        custom_translation_table={
            torch.ops.halfeven.fake_quantize.default: _translation([q.signed for q in quantizers]),
            torch.ops.halfeven.global_average_pool.default: _translate_pool,
            torch.ops.aten.gelu.default: _translate_gelu,
            **({torch.ops.aten.linear.default: _translate_linear} if weights_alone else {}),
        },
        optimize=False,
        verbose=False,
    )
    assert exported is not None
    return exported.model_proto


def four_bits(quantizer: ExportedQuantizer) -> bool:
    """Whether a quantizer's integers are written in 4 bits each."""
    return quantizer.weight and quantizer.quant_max == 7


def _translation(signed: list[bool]) -> Any:
    """What writes an operator as a pair of nodes, given for each quantizer whether its integers are signed; integers
    outside a small grid are clipped away between the two."""
    import onnx
    from onnxscript import opset19 as op

    def translate(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, axis: int, number: int) -> Any:
        kind = onnx.TensorProto.INT8 if signed[number] else onnx.TensorProto.UINT8
        zero = op.Cast(zero_point, to=kind)
        axis = 1 if axis == PER_TENSOR else axis
        integers = op.QuantizeLinear(x, scale, zero, axis=axis)
        if (quant_min, quant_max) not in WHOLE_RANGES:
            ends = [onnx.helper.make_tensor("end", kind, [], [end]) for end in (quant_min, quant_max)]
            integers = op.Clip(integers, *(op.Constant(value=end) for end in ends))
        return op.DequantizeLinear(integers, scale, zero, axis=axis)

    return translate


def _translate_pool(x: Any) -> Any:
    from onnxscript import opset19 as op

    return op.GlobalAveragePool(x)


def _translate_gelu(x: Any, approximate: str = "none") -> Any:
    """In the order of operators that ONNX Runtime makes one kernel of."""
    from onnxscript import opset19 as op

    half = op.Mul(x, 0.5)
    if approximate == "tanh":
        cubic = op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715))
        return op.Mul(half, op.Add(op.Tanh(op.Mul(cubic, math.sqrt(2 / math.pi))), 1.0))
    return op.Mul(half, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0))


def _type_of(quantizer: ExportedQuantizer) -> Any:
    if four_bits(quantizer):
        return ml_dtypes.int4
    return np.int8 if quantizer.signed else np.uint8


def _translate_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    from onnxscript import opset19 as op

    # ONNX Runtime makes a Gemm of a product of matrices, and computes that with weights in float: as a batch of one
    # matrix it reads integers.
    matrix = x.shape is not None and len(x.shape) == 2
    product = op.MatMul(op.Unsqueeze(x, [0]) if matrix else x, op.Transpose(weight, perm=[1, 0]))
    product = product if bias is None else op.Add(product, bias)
    return op.Squeeze(product, [0]) if matrix else product


class _Graph:
    """An ONNX graph with the lookups that rewriting it needs."""

    def __init__(self, graph: Any, deployed: Deployed) -> None:
        self.graph = graph
        self.deployed = deployed
        self.quantizers = {quantizer.path: quantizer for quantizer in deployed.quantizers}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {output: node for node in graph.node for output in node.output}
        self.names: dict[str, int] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def name_and_fold(self) -> None:
        """Name the nodes after their quantizers and layers, and replace weights and biases by their integers."""
        modules = dict(self.deployed.model.named_modules())
        for node in list(self.graph.node):
            if node.op_type != "QuantizeLinear":
                continue
            quantizer = self.quantizers[node.input[1].removesuffix(".scale")]
            dequantize = self._named_pair(node, quantizer)
            if not quantizer.weight:
                self._rename(dequantize, quantizer.name)
                continue
            layer = quantizer.name.removesuffix(WEIGHT_SUFFIX)
            self._fold_weight(node, dequantize, quantizer)
            for reader in list(self._layers(dequantize)):
                reader.name = self._unused(layer)
                if getattr(modules.get(layer), "bias", reader) is None:
                    del reader.input[2:]  # zeros in float, which the exporter writes where there is no bias
                if layer in self.deployed.int32_biases:
                    self._fold_bias(reader, layer, self.deployed.int32_biases[layer])
        self._drop_unused()

    def _named_pair(self, node: Any, quantizer: ExportedQuantizer) -> Any:
        """Give a pair its names, and its zero point as a constant; its DequantizeLinear."""
        (after,) = self.readers[node.output[0]]
        if after.op_type == "Clip":
            after.name = self._unused(f"{quantizer.name}.clip")
            (after,) = self.readers[after.output[0]]
        zero = self.makers.get(node.input[2])
        zeros = quantizer.zero_point.numpy().astype(_type_of(quantizer))
        node.input[2] = after.input[2] = self._constant(f"{quantizer.name}.zero_point.integer", zeros)
        if zero is not None and zero in self.graph.node:
            self.graph.node.remove(zero)
        node.name, after.name = self._unused(f"{quantizer.name}.quantize"), self._unused(quantizer.name)
        return after

    def _unused(self, name: str) -> str:
        """A node's name, numbered where a layer that is called more than once has taken it."""
        count = self.names[name] = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count - 1}"

    def _constant(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values, name)
            self.graph.initializer.append(self.constants[name])
        return name

    def _layers(self, node: Any) -> Iterator[Any]:
        """The layers that read a weight, as it is or transposed."""
        for reader in self.readers.get(node.output[0], []):
            if reader.op_type in LAYERS:
                yield reader
            elif reader.op_type in ("Transpose", "Reshape"):
                yield from self._layers(reader)

    def _rename(self, node: Any, name: str) -> None:
        """Give a node's only output another name."""
        old = node.output[0]
        for described in (*self.graph.output, *self.graph.value_info):
            if described.name == old:
                described.name = name
        for reader in self.readers.get(old, []):
            for index, given in enumerate(reader.input):
                if given == old:
                    reader.input[index] = name
        node.output[0] = name
        self.readers[name] = self.readers.pop(old, [])

    def _fold_weight(self, node: Any, dequantize: Any, quantizer: ExportedQuantizer) -> None:
        from onnx import numpy_helper

        if node.input[0] not in self.constants:  # a weight that is computed from others
            return
        weight = torch.from_numpy(numpy_helper.to_array(self.constants[node.input[0]]).copy())
        shape = [1] * weight.ndim
        if quantizer.axis != PER_TENSOR:
            shape[quantizer.axis] = -1
        integers = torch.round(weight / quantizer.scale.reshape(shape)).to(torch.int8)
        readers = self.readers[dequantize.output[0]]
        if integers.ndim == 2 and readers and all(reader.op_type == "Transpose" for reader in readers):
            # As the product reads it: a runtime need not look through the transposition for its pattern.
            integers = integers.t().contiguous()
            for attribute in dequantize.attribute:
                if attribute.name == "axis" and quantizer.axis != PER_TENSOR:
                    attribute.i = 1 - quantizer.axis
            for transpose in readers:
                self._skip(transpose)
        dequantize.input[0] = self._constant(f"{node.input[0]}.integers", integers.numpy().astype(_type_of(quantizer)))
        self.graph.node.remove(node)

    def _skip(self, node: Any) -> None:
        """Take a node out whose input is to be read in place of its output."""
        for reader in self.readers.pop(node.output[0], []):
            for index, given in enumerate(reader.input):
                if given == node.output[0]:
                    reader.input[index] = node.input[0]
            self.readers[node.input[0]] = [r for r in self.readers[node.input[0]] if r is not node] + [reader]
        self.graph.node.remove(node)

    def _fold_bias(self, layer_node: Any, layer: str, bias: Int32Bias) -> None:
        """Write a layer's bias, its third input or what is added to its product, as 32-bit integers."""
        import onnx

        holder = layer_node
        if layer_node.op_type == "MatMul":
            (holder,) = self.readers[layer_node.output[0]]
        index = next(i for i, name in enumerate(holder.input) if name.endswith(".bias") and name in self.constants)
        name = f"{layer}.bias"
        integers = bias.integers.numpy().astype(np.int32)
        scale = bias.scale.numpy()
        if f"{name}.dequantized" not in self.readers:
            inputs = [self._constant(f"{name}.integers", integers), self._constant(f"{name}.scale", scale)]
            pair = onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}.dequantized"], name=name, axis=0)
            self.graph.node.insert(0, pair)
        holder.input[index] = f"{name}.dequantized"
        self.readers.setdefault(f"{name}.dequantized", []).append(holder)

    def _drop_unused(self) -> None:
        used = {name for node in self.graph.node for name in node.input} | {out.name for out in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
