"""Sums as OpenVINO's CPU plugin takes them: in units of an operand's scale, in a convolution's kernel where it can."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.deployment.grids import quantizer_at
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, kind_of
from halfeven.runtimes.openvino.exact_values import Accumulator, Codes, ScaledSum


def sum_of_integers(node: fx.Node, args: Sequence[Codes]) -> ScaledSum | None:
    """Return the sum of two tensors of integers: one is brought to the scale of the other, less both zero points."""
    if args[0].values.shape != args[1].values.shape or len(node.all_input_nodes) != 2:
        return None
    moved, kept = args if _first_is_moved(node) else reversed(args)
    # Both zero points as one number, in units of the operand that is moved.
    zero = moved.limits.zero_byte + kept.limits.zero_byte * kept.limits.scale / moved.limits.scale
    # In this order: a difference, a product with the quotient of the scales, a sum. Each rounds in float32, and ties of
    # the next quantizer depend on them.
    values = (moved.bytes - zero) * (moved.limits.scale / kept.limits.scale) + kept.bytes
    return ScaledSum(values, kept.limits.scale)


def _first_is_moved(node: fx.Node) -> bool:
    """Return True if the first operand of a sum of integers is brought to the scale of the second.

    So it is, unless the second alone comes from a quantizer and not from an operator behind it; the quantizer of a
    model's input counts for none. (Of two quantizers, one that only the sum reads would come before one that is read
    elsewhere too; but `verify` reads all of them.)
    """
    first, second = (
        quantizer_at(operand) is not None and kind_of(operand.all_input_nodes[0]) is not OperatorKind.INPUT
        for operand in node.all_input_nodes
    )
    return first or not second


def fused_sum(node: fx.Node, args: Any) -> ScaledSum | None:
    """Return the sum of a tensor in float and a quantized skip connection, in units of the skip's scale.

    The plugin moves the scale behind the sum. A LayerNorm there cancels it, and its epsilon counts in these units.
    """
    for branch, skip, source in ((args[0], args[1], node.args[0]), (args[1], args[0], node.args[1])):
        # Either operand may come from the layer.
        if not (isinstance(branch, Tensor | Accumulator) and isinstance(skip, Codes) and isinstance(source, fx.Node)):
            continue
        if source.target is torch.ops.halfeven.branch_of_sum.default:  # in a format that has no form for it
            (source,) = source.all_input_nodes
        values = branch if isinstance(branch, Tensor) else branch.values
        if not _is_constant(source):
            unit = skip.limits.scale
            zero = skip.limits.zero_byte * unit
            if isinstance(branch, Tensor):
                # The plugin multiplies by the reciprocal, which rounds once more than a division.
                values = (values - zero) * (torch.ones_like(unit) / unit)
            else:  # the scales that a layer without a bias leaves are merged with the skip's
                values = (values - zero / branch.unit) * (branch.unit / unit)
            in_kernel = kind_of(source) is OperatorKind.CONVOLUTION and values.shape == skip.values.shape
            return ScaledSum(values + skip.bytes, unit, from_layer=in_kernel)
    return None


def _is_constant(node: fx.Node) -> bool:
    """Return True for a constant, and for its copies along an axis, which the plugin makes in the sum itself."""
    while node.target is torch.ops.aten.expand.default:
        node = node.all_input_nodes[0]
    return Op(node).is_constant


def sum_in_kernel(args: Sequence[Codes]) -> ScaledSum | None:
    """Return the sum of a skip connection and values that no quantizer rounds (see `is_unrounded`), or None."""
    for branch, skip in (args, reversed(args)):
        if branch.unrounded is not None and branch.values.shape == skip.values.shape:
            unit = skip.limits.scale
            values = branch.unrounded * (torch.ones_like(unit) / unit) + (skip.bytes - skip.limits.zero_byte)
            return ScaledSum(values, unit, from_layer=True)
    return None


def is_unrounded(quantizer: fx.Node, limits: tuple[float, float]) -> bool:
    """Return True if the plugin makes a quantizer a clip that does not round.

    So it does between a convolution, or a ReLU of a convolution, and a sum that the convolution's kernel computes.

    Behind other activation functions it rounds.

    Args:
        quantizer: what may stand between them.
        limits: the least and the largest value that it lets pass.
    """
    convolution = _operator_before_clips(quantizer, limits)
    readers = list(quantizer.users)
    if kind_of(convolution) is not OperatorKind.CONVOLUTION or len(convolution.users) != 1 or len(readers) != 1:
        return False
    (total,) = readers
    if total.target is not torch.ops.aten.add.Tensor or len(total.all_input_nodes) != 2:
        return False
    (skip,) = (operand for operand in total.all_input_nodes if operand is not quantizer)
    return read_before(skip, convolution, total)


def read_before(skip: fx.Node, convolution: fx.Node, total: fx.Node) -> bool:
    """Return True if a skip connection is read by a sum and else only before the convolution runs that is added to it.

    The convolution's kernel writes the sum where the skip connection lies.
    """
    return all(reader is total or _is_read_by(reader, convolution) for reader in skip.users)


def _operator_before_clips(quantizer: fx.Node, limits: tuple[float, float]) -> fx.Node:
    """Return the operator before a quantizer and before clips that clip no more, and that nothing else reads."""
    node = quantizer.all_input_nodes[0]
    while len(node.users) == 1 and (bounds := Op(node).bounds) and bounds[0] <= limits[0] and limits[1] <= bounds[1]:
        node = node.all_input_nodes[0]
    return node


def _is_read_by(node: fx.Node, later: fx.Node) -> bool:
    """Return True if a later node depends on a node."""
    if node is later:
        return False
    # Depth first, upwards: each node once, since branches of a network meet again.
    seen = set()
    waiting = list(later.all_input_nodes)
    while waiting:
        if (current := waiting.pop()) is node:
            return True
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return False
