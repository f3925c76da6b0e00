"""ONNX: QuantizeLinear and DequantizeLinear at opset 19, weights as int8 initializers."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfeven.export.operators import PER_TENSOR, ExportedQuantizer

OPSET = 19
"""The oldest opset with all that 8 bits need; 21 and later trip ONNX Runtime on signed activations (its issue
25526)."""

WIDE_ENOUGH = 8
"""Grids of fewer bits are written in 8-bit types: opset 19 has no smaller ones."""


def write(program: torch.export.ExportedProgram, quantizers: list[ExportedQuantizer], path: Path) -> None:
    """Write the program as one ONNX file with a free batch size."""
    import onnx

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table={torch.ops.halfeven.fake_quantize.default: _translate},
        optimize=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    _name_and_fold(model, {quantizer.name: quantizer for quantizer in quantizers})
    onnx.checker.check_model(model, full_check=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".onnx")
    os.close(handle)
    try:
        onnx.save(model, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _translate(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, axis: int, number: int) -> Any:
    """The operator as a pair of nodes; integers outside a narrow or small grid are clipped away before."""
    import onnx
    from onnxscript import opset19 as op

    signed = quant_min < 0
    zero = op.Cast(zero_point, to=onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8)
    axis = 1 if axis == PER_TENSOR else axis
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero, axis=axis), scale, zero, axis=axis)


def _name_and_fold(model: Any, quantizers: dict[str, ExportedQuantizer]) -> None:
    """Name the nodes after their quantizers and layers, and replace each weight and its QuantizeLinear by int8."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in list(graph.node):
        if node.op_type != "QuantizeLinear":
            continue
        quantizer = quantizers[node.input[1].removesuffix(".scale")]
        (dequantize,) = readers[node.output[0]]
        zero = makers.get(node.input[2])
        zeros = quantizer.zero_point.numpy().astype(np.int8 if quantizer.quant_min < 0 else np.uint8)
        name = f"{quantizer.name}.zero_point.integer"
        if name not in constants:
            constants[name] = numpy_helper.from_array(zeros, name)
            graph.initializer.append(constants[name])
        node.input[2] = dequantize.input[2] = name
        if zero is not None and zero in graph.node:
            graph.node.remove(zero)
        node.name, dequantize.name = f"{quantizer.name}.quantize", quantizer.name
        if quantizer.weight:
            _fold_weight(graph, constants, node, dequantize, quantizer)
            for reader in _layers(dequantize, readers):
                reader.name = quantizer.name.removesuffix(".weight_quantizer")
        else:
            _rename(graph, dequantize, quantizer.name, readers)
    _drop_unused(graph)
    for described in (*graph.node, *graph.initializer, *graph.value_info, graph, model):
        del described.metadata_props[:]  # the tracer's notes, a quarter of a small file
    del graph.value_info[:]


def _layers(node: Any, readers: dict[str, list[Any]]) -> Iterator[Any]:
    """The layers that read a weight, as it is or transposed."""
    for reader in readers.get(node.output[0], []):
        if reader.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            yield reader
        elif reader.op_type in ("Transpose", "Reshape"):
            yield from _layers(reader, readers)


def _rename(graph: Any, node: Any, name: str, readers: dict[str, list[Any]]) -> None:
    """Give a node's only output another name."""
    old = node.output[0]
    for output in graph.output:
        if output.name == old:
            output.name = name
    for reader in readers.get(old, []):
        for index, given in enumerate(reader.input):
            if given == old:
                reader.input[index] = name
    node.output[0] = name
    readers[name] = readers.pop(old, [])


def _fold_weight(
    graph: Any, constants: dict[str, Any], node: Any, dequantize: Any, quantizer: ExportedQuantizer
) -> None:
    from onnx import numpy_helper

    if node.input[0] not in constants:  # a weight that is computed from others
        return
    weight = torch.from_numpy(numpy_helper.to_array(constants[node.input[0]]).copy())
    axis = None if quantizer.axis == PER_TENSOR else quantizer.axis
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    integers = torch.round(weight / quantizer.scale.reshape(shape)).to(torch.int8).numpy()
    name = f"{node.input[0]}.integers"
    if name not in constants:
        constants[name] = numpy_helper.from_array(integers, name)
        graph.initializer.append(constants[name])
    dequantize.input[0] = name
    graph.node.remove(node)


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
