"""Tell feature maps from masks and embeddings: a sum of two feature maps is a skip connection, which runs in integers.

A mask of -10,000 or a bias of distances would give the sum a range in which features have no resolution left, and a
position embedding is a constant, whatever resizes or casts it.
"""

from torch import fx

from halfeven.graph.data_flow import computed_from_inputs, operands_of_values
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.view import operations
from halfeven.placement.sources import sources

K = OperatorKind
LAYERS = frozenset({*WEIGHTED, K.MATMUL})

KEEPS_MEANING = frozenset(
    {*TRANSPARENT, K.CONCAT, K.PAD, K.AVERAGE, K.INTERPOLATION, K.ACTIVATION, K.BATCH_NORM, K.NORMALIZATION}
)
"""Kinds after which an input that layers read, such as an image, is still a feature map. Arithmetic with constants is
not among them: it makes masks of inputs."""


def feature_maps(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of a graph that yield feature maps.

    They are the results of layers, all that is computed from these in floating point (a comparison ends that), the
    tensors that layers read, and these resized, pooled or normalized.
    """
    from_layers: set[fx.Node] = set()
    found = _read_by_layers(graph)
    for op in operations(graph):
        # Several results of a module that stays Python have no recorded values.
        carries = op.yields_floats or op.value is None
        operands = {operand.node for operand in operands_of_values(op)} if carries else set()
        if op.kind in LAYERS or not operands.isdisjoint(from_layers):
            from_layers.add(op.node)
        if op.node in from_layers or (op.kind in KEEPS_MEANING and not operands.isdisjoint(found)):
            found.add(op.node)
    return found


def computed_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the inputs, or that layers compute, of an embedding for example.

    All other nodes are parameters, and what elementwise operators and moves make of parameters and sizes.
    """
    return computed_from_inputs(graph) | feature_maps(graph)


def _read_by_layers(graph: fx.Graph) -> set[fx.Node]:
    given = computed_from_inputs(graph)
    read = [op.inputs[0].node for op in operations(graph) if op.kind in LAYERS and op.inputs]
    return {source for node in read for source in sources(node) if source in given}
