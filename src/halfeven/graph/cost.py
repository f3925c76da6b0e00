"""Count the multiply-accumulates of a graph's operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from halfeven.graph.operators import WEIGHTED, Arguments, OperatorKind
from halfeven.graph.operators.layers import RECURRENT
from halfeven.graph.torch_private import fake_tensors, is_aten, is_operator, pytree
from halfeven.graph.view import Op

aten = torch.ops.aten
K = OperatorKind


def multiply_accumulates(node: fx.Node) -> int:
    """Return the multiply-accumulates of an operator: of a layer, of a product, of recurrent cells or of attention.

    They are counted for the sizes that the graph was traced with; elementwise operators have none.
    """
    op = Op(node)
    if op.kind is K.MATMUL:
        return _element_count(op.shape) * _concrete_size(op.inputs[0].shape[-1])
    if op.kind in WEIGHTED:
        return _layer_macs(op)
    if op.row in RECURRENT:
        return _recurrence_macs(op)
    if op.function is aten.scaled_dot_product_attention.default:
        return _attention_macs(op.arguments)
    if op.kind is K.FLOAT and _may_multiply(op):
        return _counted_by_torch(op)
    return 0


def elements(node: fx.Node) -> int:
    """Return the number of values of a tensor, for the sizes that the graph was traced with."""
    return _element_count(Op(node).shape)


def _layer_macs(op: Op) -> int:
    weight: Any = op.module.weight if op.is_module else op.inputs[1].value
    # A transposed convolution multiplies each input by a whole window; other layers compute each output from a window.
    walked = op.inputs[0] if op.kind is K.TRANSPOSED_CONVOLUTION else op
    return _element_count(walked.shape) * _element_count(weight.shape[1:])


def _recurrence_macs(op: Op) -> int:
    # The weights of two axes, those of all layers and directions, each multiply the values of every step.
    steps = _element_count(op.inputs[0].shape[:-1])  # of all samples
    weights = [Op(parameter).value for parameter in op.argument("params")]
    return steps * sum(_element_count(weight.shape) for weight in weights if weight.ndim == 2)


def _attention_macs(given: Arguments) -> int:
    query, key, value = (Op(given[name]).shape for name in ("query", "key", "value"))
    return (
        # query key^T, and the probabilities times value, for each pair of positions.
        _element_count(query[:-1]) * _concrete_size(key[-2]) * (_concrete_size(query[-1]) + _concrete_size(value[-1]))
    )


DEPENDS_ON_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


def _may_multiply(op: Op) -> bool:
    if not is_operator(op.function) or not is_aten(op.function) or torch.Tag.pointwise in op.function.tags:
        return False
    known = not any(tag in op.function.tags for tag in DEPENDS_ON_VALUES)
    return known and op.yields_floats and any(operand.yields_floats for operand in op.inputs)


def _counted_by_torch(op: Op) -> int:
    """Return the count of PyTorch's own counter, which sees the products that an operator such as einsum is made of."""
    with fake_tensors(), FlopCounterMode(display=False) as counter:
        args, kwargs = fx.map_arg(
            (op.node.args, op.node.kwargs), lambda node: pytree.tree_map(_without_data, Op(node).value)
        )
        args, kwargs = pytree.tree_map(_traced_size, (args, kwargs))
        call: Callable[..., Any] = op.function
        call(*args, **kwargs)
    # The counter counts a multiply-accumulate as two operations.
    return int(counter.get_total_flops()) // 2


def _without_data(value: Any) -> Any:
    """Return a tensor of a recorded result's sizes, without data."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty([_concrete_size(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _traced_size(value: Any) -> Any:
    return _concrete_size(value) if isinstance(value, torch.SymInt) else value


def _element_count(shape: Any) -> int:
    result = 1
    for size in shape:
        result *= _concrete_size(size)
    return result


def _concrete_size(size: Any) -> int:
    """Return a size; for a free axis, the size that it was traced with."""
    return size if isinstance(size, int) else int(size.node.hint)
