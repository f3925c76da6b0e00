"""Hard sigmoids of integers as additions of integers, which the runtime has a kernel for: it computes others in float.

clip(x / 6 + 1/2, 0, 1) is a sum of the same integers, read with a sixth of their scale, and of a constant. The ends of
the result's grid are the clip.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOPE = float(np.float32(1 / 6))
OFFSET = 0.5
"""Hard sigmoid: clip(SLOPE * x + OFFSET, 0, 1), as ONNX files hold PyTorch's."""

LARGEST_CODE = 255


def needs_no_clip(scale: Tensor, zero_point: Tensor, low: int, high: int) -> bool:
    """Return True for a grid of all bytes that begins at 0 and ends at 1 or below: a sum needs no clip before it."""
    return low == 0 == float(zero_point) and high == LARGEST_CODE <= float(torch.round(1 / scale))


def operand_scales(scale: Any) -> tuple[Any, Any]:
    """Return the scales of both operands: of the input's integers, and of the constant, whose integer is 255."""
    return scale * type(scale)(SLOPE), OFFSET / LARGEST_CODE


def write_gates_as_sums(model: Any) -> None:
    """Write each HardSigmoid between two quantizers as their addition, in an `onnx_ir.Model`, in place."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "HardSigmoid"]:
        pair = node.inputs[0].producer()
        readers = list(node.outputs[0].consumers())
        if pair is None or pair.op_type != "DequantizeLinear" or len(readers) != 1 or node.outputs[0].is_graph_output():
            continue
        if readers[0].op_type == "QuantizeLinear" and _grid_clips(readers[0]):
            _write_sum(graph, node, pair)


def _grid_clips(quantize: Any) -> bool:
    """Return True for a quantizer with the grid that `needs_no_clip` describes."""
    scale, zero_point = (value.const_value for value in quantize.inputs[1:3])
    if any(reader.op_type == "Clip" for reader in quantize.outputs[0].consumers()):
        return False
    if zero_point.numpy().dtype != np.uint8 or scale.numpy().ndim:
        return False
    numbers = [torch.from_numpy(np.array(one.numpy(), np.float32)) for one in (scale, zero_point)]
    return needs_no_clip(numbers[0], numbers[1], 0, LARGEST_CODE)


def _write_sum(graph: Any, node: Any, pair: Any) -> None:
    import onnx_ir

    scale = np.float32(pair.inputs[1].const_value.numpy())
    finer, half = operand_scales(scale)
    name = node.name
    constants = {
        "scale": np.array(finer, np.float32),
        "half": np.array(LARGEST_CODE, np.uint8),
        "half.scale": np.array(half, np.float32),
        "half.zero_point": np.array(0, np.uint8),
    }
    values = [
        onnx_ir.val(f"{name}.{ending}", const_value=onnx_ir.tensor(value, name=f"{name}.{ending}"))
        for ending, value in constants.items()
    ]
    for value in values:
        graph.register_initializer(value)
    # x / 6: the input's integers with a sixth of their scale. 1 / 2: the integer 255 with a scale of its own.
    sixth = onnx_ir.node("DequantizeLinear", [pair.inputs[0], values[0], pair.inputs[2]], name=f"{name}.sixth")
    offset = onnx_ir.node("DequantizeLinear", values[1:], name=f"{name}.offset")
    total = onnx_ir.node("Add", [sixth.outputs[0], offset.outputs[0]], name=name)
    for made, ending in ((sixth, "sixth"), (offset, "offset"), (total, "sum")):
        made.outputs[0].name = f"{name}.{ending}.output"
        made.outputs[0].type = node.outputs[0].type
        graph.insert_before(node, made)
    total.outputs[0].shape = node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(total.outputs[0])
    graph.remove(node, safe=True)
