"""The share of a model's work that ran in integers."""

from collections.abc import Sequence

from torch import fx

from halfeven.deployment.quantize_op import WEIGHT_SUFFIX, ExportedQuantizer
from halfeven.graph.cost import multiply_accumulates
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import kind_of, module_of
from halfeven.runtimes.layer_execution import LayerExecution


def integer_share(
    parts: dict[str, CapturedModule], layers: Sequence[LayerExecution], products: Sequence[LayerExecution]
) -> float:
    """Return the share of a deployed model's multiply-accumulates that ran with integer kernels.

    Args:
        parts: the deployed model's regions by name, their quantizers written as operators.
        layers: the runtime's account of the layers with quantized weights.
        products: its account of products of activations. A runtime names them as it likes, so their work is counted by
            the share of them that ran in integers.
    """
    ran = {layer.layer: layer.integer for layer in layers}
    of_products = sum(product.integer for product in products) / len(products) if products else 0.0
    whole = 0
    integer = 0.0
    for prefix, region in parts.items():
        for node in region.graph.nodes:
            if not (work := multiply_accumulates(node)):
                continue
            whole += work
            if kind_of(node) is OperatorKind.MATMUL:
                integer += work * of_products
            elif kind_of(node) in WEIGHTED:
                integer += work * ran.get(_layer_of(node, f"{prefix}." if prefix else ""), False)
    return integer / whole if whole else 0.0


def _layer_of(node: fx.Node, prefix: str) -> str:
    """Return the name of a layer in a file: its path, or that of its weight's quantizer."""
    if node.op == "call_module":
        return f"{prefix}{node.target}"
    source = node.args[1]
    assert isinstance(source, fx.Node)
    quantizer = module_of(source) if source.op == "call_module" else None
    return quantizer.name.removesuffix(WEIGHT_SUFFIX) if isinstance(quantizer, ExportedQuantizer) else ""
