"""A translated ONNX graph with names and integers: nodes named after quantizers and layers, weights as int8."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch

from halfeven.deployment.deployed import Deployed, Int32Bias
from halfeven.deployment.layer_calls import call_name
from halfeven.deployment.quantize_op import PER_TENSOR, WEIGHT_SUFFIX, ExportedQuantizer

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def name_and_fold(graph: Any, deployed: Deployed) -> None:
    """Name nodes after their quantizers and layers, and replace weights and biases by their integers, in place.

    Args:
        graph: the `onnx_ir.Graph` of a deployed model's program.
        deployed: the model.
    """
    _write_known_sizes(graph)
    _leave_out_zero_biases(graph)
    # By path, under which its buffers lie in the model; the name in the file may be another.
    quantizers = {quantizer.path: quantizer for quantizer in deployed.quantizers}
    taken = Counter[str]()
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        # The exporter names initializers after buffers, and the buffer `<quantizer>.scale` identifies its quantizer.
        quantizer = quantizers[node.inputs[1].name.removesuffix(".scale")]
        dequantize = _name_pair(graph, node, quantizer, taken)
        if not quantizer.weight:
            dequantize.outputs[0].name = quantizer.name
            continue
        layer = quantizer.name.removesuffix(WEIGHT_SUFFIX)
        _fold_weight(graph, node, dequantize, quantizer)
        for reader in list(_layers_reading(dequantize)):
            # Calls of a layer are numbered in the order of the graph, as `named_calls` numbers them.
            taken[layer] += 1
            reader.name = call_name(layer, taken[layer])
            if layer in deployed.int32_biases:
                _fold_bias(graph, reader, layer, deployed.int32_biases[layer])


def _write_known_sizes(graph: Any) -> None:
    """Write sizes that are known as constants, in place of operators that read them, in place.

    ONNX Runtime cannot know them, and would cut the weights of a recurrence for each gate anew in each run.
    """
    for node in [node for node in graph if node.op_type == "Shape" and node.inputs[0].shape is not None]:
        first, last = (node.attributes[end].as_int() if end in node.attributes else None for end in ("start", "end"))
        sizes = node.inputs[0].shape[first:last]
        if all(isinstance(size, int) for size in sizes):
            name = f"{node.outputs[0].name}.sizes"
            node.outputs[0].replace_all_uses_with(_initializer(graph, name, np.array(sizes, np.int64)))
            graph.remove(node, safe=True)


def _leave_out_zero_biases(graph: Any) -> None:
    """Take the biases from convolutions that have none in the model, in place.

    The exporter writes zeros of the input's type for them. They are no constant, so ONNX Runtime would neither fold a
    BatchNorm into such a convolution nor compute it in integers.
    """
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3 and _is_expanded_zero(node.inputs[2]):
            node.resize_inputs(2)


def _is_expanded_zero(value: Any) -> bool:
    """Return True for a zero that is cast to the type of another tensor, then expanded."""
    chain = []
    while value is not None and (node := value.producer()) is not None:
        chain.append(node.op_type)
        constant = node.attributes.get("value")
        value = node.inputs[0] if node.inputs else None
    return chain == ["Expand", "CastLike", "Constant"] and float(constant.as_tensor().numpy()) == 0.0


def four_bits(quantizer: ExportedQuantizer) -> bool:
    """Return True for a quantizer whose integers are written in 4 bits each."""
    # The narrow grid of 4 bits is -7 to 7.
    return quantizer.weight and quantizer.quant_max == 7


def _name_pair(graph: Any, node: Any, quantizer: ExportedQuantizer, taken: Counter[str]) -> Any:
    """Give a pair its names, and its zero point as a constant; return its DequantizeLinear."""
    after = _only_reader(node)
    if after.op_type == "Clip":
        after.name = _numbered_name(f"{quantizer.name}.clip", taken)
        after = _only_reader(after)
    zeros = quantizer.zero_point.numpy().astype(_integer_type(quantizer))
    constant = _initializer(graph, f"{quantizer.name}.zero_point.integer", zeros)
    # The zero point is an int32 buffer, which the translation casts. ONNX Runtime fuses only pairs whose zero point is
    # a constant.
    cast = node.inputs[2].producer()
    node.replace_input_with(2, constant)
    after.replace_input_with(2, constant)
    if cast is not None:
        graph.remove(cast, safe=True)
    node.name = _numbered_name(f"{quantizer.name}.quantize", taken)
    after.name = _numbered_name(quantizer.name, taken)
    return after


def _only_reader(node: Any) -> Any:
    (reader,) = node.outputs[0].consumers()
    return reader


def _numbered_name(name: str, taken: Counter[str]) -> str:
    """Return a node's name, numbered where the same quantizer of a weight has taken it."""
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def _integer_type(quantizer: ExportedQuantizer) -> Any:
    if four_bits(quantizer):
        return ml_dtypes.int4
    return np.int8 if quantizer.signed else np.uint8


def _initializer(graph: Any, name: str, values: Any) -> Any:
    """Return the initializer of a name, which is made where there is none yet."""
    import onnx_ir

    if name not in graph.initializers:
        graph.register_initializer(onnx_ir.val(name, const_value=onnx_ir.tensor(values, name=name)))
    return graph.initializers[name]


def _layers_reading(node: Any) -> Iterator[Any]:
    """Yield the layers that read a weight, as it is or transposed."""
    for reader in node.outputs[0].consumers():
        if reader.op_type in LAYERS:
            yield reader
        elif reader.op_type in ("Transpose", "Reshape"):
            yield from _layers_reading(reader)


def _fold_weight(graph: Any, node: Any, dequantize: Any, quantizer: ExportedQuantizer) -> None:
    """Store a weight as integers: its DequantizeLinear reads them in place of a QuantizeLinear of numbers."""
    import onnx_ir

    source = node.inputs[0]
    if source.const_value is None:  # a weight that is computed from others
        return
    weight = torch.from_numpy(source.const_value.numpy().copy())
    shape = [1] * weight.ndim
    if quantizer.axis != PER_TENSOR:
        shape[quantizer.axis] = -1
    # The deployed weights lie on their grids already, so this division finds integers back and decides nothing.
    integers = torch.round(weight / quantizer.scale.reshape(shape)).to(torch.int8)
    readers = dequantize.outputs[0].consumers()
    if integers.ndim == 2 and readers and all(reader.op_type == "Transpose" for reader in readers):
        # As the product reads it: a runtime need not look through the transposition for its pattern.
        integers = integers.t().contiguous()
        if quantizer.axis != PER_TENSOR:
            # The outputs of a transposed matrix are its other axis.
            dequantize.attributes["axis"] = onnx_ir.AttrInt64("axis", 1 - quantizer.axis)
        for transpose in readers:
            transpose.outputs[0].replace_all_uses_with(dequantize.outputs[0])
            graph.remove(transpose, safe=True)
    constant = _initializer(graph, f"{source.name}.integers", integers.numpy().astype(_integer_type(quantizer)))
    dequantize.replace_input_with(0, constant)
    graph.remove(node, safe=True)


def _fold_bias(graph: Any, layer_node: Any, layer: str, bias: Int32Bias) -> None:
    """Write a layer's bias, its third input or the term added to its product, as 32-bit integers."""
    import onnx_ir

    # A MatMul has no bias input: its bias is an Add behind it.
    holder = _only_reader(layer_node) if layer_node.op_type == "MatMul" else layer_node
    index = next(
        i for i, value in enumerate(holder.inputs) if value.const_value is not None and value.name.endswith(".bias")
    )
    name = f"{layer}.bias"
    integers = _initializer(graph, f"{name}.integers", bias.integers.numpy().astype(np.int32))
    scale = _initializer(graph, f"{name}.scale", bias.scale.numpy())
    pair = next((reader for reader in integers.consumers() if reader.op_type == "DequantizeLinear"), None)
    # A layer that is called more than once has one bias, and one pair for it.
    if pair is None:
        pair = onnx_ir.node("DequantizeLinear", [integers, scale], {"axis": 0}, name=name)
        pair.outputs[0].name = f"{name}.dequantized"
        graph.insert_before(graph[0], pair)
    holder.replace_input_with(index, pair.outputs[0])
