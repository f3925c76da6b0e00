"""Attentions that OpenVINO's CPU plugin runs as a single operator, with its quantizers inside."""

import torch
from torch import fx

from halfeven.deployment.grids import quantizer_at
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import kind_of
from halfeven.runtimes.cpu import has_avx512_vnni


def is_in_attention(quantizer: fx.Node) -> bool:
    """Return True if the operator that computes a whole attention, in files as users run them, quantizes its result."""
    return has_avx512_vnni() and _ends_attention(quantizer)


def _ends_attention(quantizer: fx.Node) -> bool:
    """Return True if a quantizer reads the second product of an attention.

    Its first factor is quantized, and a softmax of the first product or of elementwise functions of it.
    """
    product = quantizer.all_input_nodes[0]
    if kind_of(product) is not OperatorKind.MATMUL or quantizer_at(weights := product.all_input_nodes[0]) is None:
        return False
    softmax = weights.all_input_nodes[0]
    return kind_of(softmax) is OperatorKind.SOFTMAX and _leads_from_product(softmax.all_input_nodes[0])


def _leads_from_product(node: fx.Node) -> bool:
    elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return kind_of(node) is OperatorKind.MATMUL or (elementwise and any(map(_leads_from_product, node.all_input_nodes)))
