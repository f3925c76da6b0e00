"""Convolutions that OpenVINO's CPU plugin adds a skip connection to, in the memory of the latter."""

import torch
from torch import fx

from halfeven.graph.operators import OperatorKind, clipping, kind_of


def is_unrounded(quantizer: fx.Node, ends: tuple[float, float]) -> bool:
    """Whether the plugin makes a quantizer a clip that does not round: one between a convolution, or a ReLU of one, and
    a sum that is taken in the convolution's kernel.

    The kernel writes the sum where the other operand lies, so all others that read that one must come before the
    convolution. Behind other activation functions it rounds.

    Args:
        quantizer: what may stand between them.
        ends: the least and the largest value that it lets pass.
    """
    convolution = _before_clips(quantizer, ends)
    readers = list(quantizer.users)
    if kind_of(convolution) is not OperatorKind.CONVOLUTION or len(convolution.users) != 1 or len(readers) != 1:
        return False
    (total,) = readers
    if total.target is not torch.ops.aten.add.Tensor or len(total.all_input_nodes) != 2:
        return False
    (skip,) = (operand for operand in total.all_input_nodes if operand is not quantizer)
    return all(reader is total or _leads_to(reader, convolution) for reader in skip.users)


def _before_clips(quantizer: fx.Node, ends: tuple[float, float]) -> fx.Node:
    """What a quantizer reads, before the clips between that clip no more than it does, and that nothing else reads."""
    node = quantizer.all_input_nodes[0]
    while (bounds := clipping(node)) is not None and bounds[0] <= ends[0] and ends[1] <= bounds[1]:
        if len(node.users) != 1:
            break
        node = node.all_input_nodes[0]
    return node


def _leads_to(node: fx.Node, later: fx.Node) -> bool:
    """Whether a node is computed before another one, which depends on it."""
    if node is later:
        return False
    seen, waiting = set(), list(later.all_input_nodes)
    while waiting:
        if (current := waiting.pop()) is node:
            return True
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return False
