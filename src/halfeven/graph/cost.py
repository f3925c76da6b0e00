"""Count the multiply-accumulates of a graph's products."""

from typing import Any

from torch import fx

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.view import Op, kind_of, module_of


def multiply_accumulates(node: fx.Node) -> int:
    """Return the multiply-accumulates of a convolution, linear layer or matrix product; 0 for other operators.

    They are counted for the batch size that the graph was traced with.
    """
    kind = kind_of(node)
    if kind is OperatorKind.MATMUL:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        return _size(Op(node).shape) * _number(Op(first).shape[-1])
    if kind not in WEIGHTED:
        return 0
    if Op(node).is_module:
        weight: Any = module_of(node).weight
    else:
        source = node.args[1]
        assert isinstance(source, fx.Node)
        weight = Op(source).value
    # A transposed convolution multiplies each input by a whole window; other layers compute each output from a window.
    transposed = kind is OperatorKind.TRANSPOSED_CONVOLUTION
    walked = node.all_input_nodes[0] if transposed else node
    return _size(Op(walked).shape) * _size(weight.shape[1:])


def _size(shape: Any) -> int:
    result = 1
    for size in shape:
        result *= _number(size)
    return result


def _number(size: Any) -> int:
    """Return a size; for a free axis, the size that it was traced with."""
    return size if isinstance(size, int) else int(size.node.hint)
