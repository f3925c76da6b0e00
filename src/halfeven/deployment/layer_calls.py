"""Name the calls of layers with quantized weights, so that each can be found in a file and in what a runtime ran."""

from torch import fx

from halfeven.deployment.quantize_op import WEIGHT_SUFFIX, ExportedQuantizer
from halfeven.graph.operators import WEIGHTED
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, operations
from halfeven.quantization.model_quantizers import has_quantized_weight


def call_name(layer: str, number: int) -> str:
    """Return the name in a file of a layer's call, of which the first, number 1, has the layer's own name."""
    return layer if number == 1 else f"{layer}_call_{number}"


def named_calls(parts: dict[str, CapturedModule]) -> dict[fx.Node, str]:
    """Return the calls of layers with quantized weights, each with its name, in the order of the graphs.

    Args:
        parts: a deployed model's regions by name, their quantizers written as operators.
    """
    found: dict[fx.Node, str] = {}
    numbers: dict[str, int] = {}
    for prefix, region in parts.items():
        for op in operations(region.graph):
            layer = _quantized_layer_name(op, f"{prefix}." if prefix else "")
            if layer is not None:
                numbers[layer] = numbers.get(layer, 0) + 1
                found[op.node] = call_name(layer, numbers[layer])
    return found


def _quantized_layer_name(op: Op, prefix: str) -> str | None:
    """Return the name of a layer with a quantized weight in a file: its path, or that of its weight's quantizer."""
    if op.kind not in WEIGHTED:
        return None
    if op.is_module:
        return f"{prefix}{op.path}" if has_quantized_weight(op.module) else None
    quantizer = op.inputs[1].module
    return quantizer.name.removesuffix(WEIGHT_SUFFIX) if isinstance(quantizer, ExportedQuantizer) else None
