"""ONNX graphs in float16: tensors and constants have it in place of float32, except for inputs and outputs."""

import importlib
import sys
from typing import Any

import numpy as np

from halfeven.runtimes.onnx.file import onnxruntime

IN_BOTH_TYPES = frozenset(("Min", "Max", "TopK", "CumSum"))
"""Operators that the converter leaves in float32 and that ONNX defines for float16."""


def in_half(model: Any) -> Any:
    """Return an `onnx_ir.Model` with float16 in place of float32.

    A DequantizeLinear returns the type of its scale, so scales are float16 too; then every operator between two
    quantizers reads and returns float16, and no precision is left to a builder's flags. Casts stand at the inputs and
    outputs alone, and around operators that ONNX does not define for float16.
    """
    import onnx_ir

    float16 = half_converter()
    left = [name for name in float16.DEFAULT_OP_BLOCK_LIST if name not in IN_BOTH_TYPES]
    proto = onnx_ir.to_proto(model)
    converted = float16.convert_float_to_float16(
        proto, keep_io_types=True, op_block_list=left, force_fp16_initializers=True
    )
    half = onnx_ir.from_proto(converted)
    half.graph.sort()  # the converter appends its casts
    _keep_constants(half.graph)
    return half


def half_converter() -> Any:
    """Import ONNX Runtime's converter; the folder that it adds to the places of modules is removed again."""
    onnxruntime()
    before = list(sys.path)
    converter = importlib.import_module("onnxruntime.transformers.float16")
    sys.path[:] = [place for place in sys.path if place in before]
    return converter


def _keep_constants(graph: Any) -> None:
    """Write constants in the type of their reader, in place, where the converter has cast them: the factors of a
    Resize, which are float32 in every graph."""
    import onnx_ir

    for node in [node for node in graph if node.op_type == "Cast"]:
        source = _constant_values(node.inputs[0])
        if source is None:
            continue
        kind = onnx_ir.DataType(node.attributes["to"].as_int())
        name = f"{node.outputs[0].name}.constant"
        constant = onnx_ir.val(name, const_value=onnx_ir.tensor(source.astype(kind.numpy()), name=name))
        graph.register_initializer(constant)
        node.outputs[0].replace_all_uses_with(constant)
        maker = node.inputs[0].producer()
        graph.remove(node, safe=True)
        if maker is not None and not maker.outputs[0].uses():
            graph.remove(maker, safe=True)


def _constant_values(value: Any) -> Any:
    """Return the numbers of a value that is a constant, as an array; None for any other value."""
    if value.const_value is not None:
        return value.const_value.numpy()
    maker = value.producer()
    if maker is None or maker.op_type != "Constant":
        return None
    (attribute,) = maker.attributes.values()
    return attribute.value.numpy() if attribute.name == "value" else np.array(attribute.value, np.float32)
