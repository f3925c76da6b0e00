"""Find the tensors of a graph whose values depend on the model's inputs; all others are the same for every sample."""

from torch import fx

from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.view import Op, operations

SHAPE_READERS = ("sym_size", "sym_stride", "sym_numel")
"""Operators whose result is a size of a tensor."""

PASSING_MODULES = (OperatorKind.BATCH_NORM, OperatorKind.ACTIVATION, *TRANSPARENT)
"""Kinds of modules behind which the readers of a tensor are looked for; behind other modules they are not."""


def computed_from_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of a graph whose values depend on values of the inputs.

    Zeros of an input's size, a position's cosine and a resized position embedding are the same for all inputs of a
    size.
    """
    found: set[fx.Node] = set()
    for op in operations(graph):
        if op.is_input or any(operand.node in found for operand in operands_of_values(op)):
            found.add(op.node)
    return found


def operands_of_values(op: Op) -> tuple[Op, ...]:
    """Return the operands whose values an operator reads; of all other operands it reads the size or type."""
    if not op.is_function:
        return op.inputs
    if op.name in SHAPE_READERS or op.name.endswith("_like") or op.name.startswith("new_"):
        return ()
    return op.inputs[:1] if op.name.endswith("_as") else op.inputs


def is_read_for_its_size(node: fx.Node) -> bool:
    """Return True for a tensor whose values nothing reads, such as that of `zeros_like(layer(x))`.

    Runtimes do not compute it. A layer, a product and an output read the values, directly or behind other operators.
    """
    waiting = [node]
    seen = {node}
    while waiting:
        op = Op(waiting.pop())
        for reader in map(Op, op.node.users):
            if reader.node in seen or op not in operands_of_values(reader):
                continue
            ends = reader.is_output or reader.kind in (*WEIGHTED, OperatorKind.MATMUL)
            if ends or (reader.is_module and reader.kind not in PASSING_MODULES):
                return False
            seen.add(reader.node)
            waiting.append(reader.node)
    return True
