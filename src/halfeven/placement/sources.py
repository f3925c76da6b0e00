"""Find the operators that make the values of a tensor: the ends at which a request for integers arrives."""

from collections.abc import Iterator

from torch import fx

from halfeven.graph.operators import TRANSPARENT, OperatorKind
from halfeven.graph.view import kind_of

K = OperatorKind


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the operators that made the values of a tensor, upwards through those that keep the scale."""
    kind = kind_of(node)
    if kind is K.CONCAT:
        for operand in node.all_input_nodes:
            yield from sources(operand)
    elif kind in TRANSPARENT:
        yield from sources(node.all_input_nodes[0])
    else:
        yield node


def fused_group(node: fx.Node) -> list[fx.Node]:
    """Return an operator and the activation, BatchNorm and layer that are fused with it, last to first."""
    group = [node]
    while kind_of(group[-1]) in (K.ACTIVATION, K.BATCH_NORM) and group[-1].all_input_nodes:
        group.append(group[-1].all_input_nodes[0])
    return group


def head(node: fx.Node) -> fx.Node:
    """Return the first operator of a fused group, for example the convolution before a BatchNorm and a ReLU."""
    return fused_group(node)[-1]


def behind_convolution(node: fx.Node) -> bool:
    """Return True for a tensor, or a concatenation, of which a convolution makes a part: products read its integers."""
    return any(kind_of(head(source)) in (K.CONVOLUTION, K.TRANSPOSED_CONVOLUTION) for source in sources(node))
