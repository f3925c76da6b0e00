"""Find the arithmetic that stays in float on every runtime: that on a detector's coordinates, and that on parameters.

A detector's last layers return offsets, distances or bins, from which operators compute boxes: products with strides
and anchors, differences, expectations over bins. Coordinates need more than 8 bits: in an image of 640 pixels, a step
of 8 bits is 2.5 pixels. In float, these operators cost next to nothing.
"""

from torch import fx

from halfeven.graph.data_flow import is_read_for_its_size
from halfeven.graph.layer_shapes import weight_shape
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.view import Op, kind_of
from halfeven.placement.sources import sources

K = OperatorKind

MOST_COORDINATES = 4
"""Coordinates of a box; a point has 2."""


def reason_for_float(node: fx.Node) -> str | None:
    """Return why an operator on coordinates or parameters stays in float, unless a rule quantizes it; else None."""
    kind = kind_of(node)
    if reads_parameters(node):
        return "it reads a parameter, alone or joined to a tensor, and no quantizer makes integers of that"
    if kind in WEIGHTED and _is_called_for_sizes(node):
        return "nothing reads its values, only their size"
    if kind in (K.ADD, K.MULTIPLY) and _decodes_outputs(node):
        return "it decodes results of the model, behind its last layers"
    if kind not in (K.CONVOLUTION, K.LINEAR):
        return None
    if _is_expectation(node):
        return "it is an expectation over a softmax, whose result is a coordinate"
    if _reads_coordinates(node):
        return f"it reads {_input_size(node)} coordinates, which 8 bits would move"
    return None


def reads_parameters(node: fx.Node) -> bool:
    """Return True for a layer on parameters, such as the learned queries of a decoder, or a token joined to others."""
    operand = node.args[0] if kind_of(node) in WEIGHTED else None
    return isinstance(operand, fx.Node) and any(kind_of(source) is K.CONSTANT for source in sources(operand))


def has_no_integers(node: fx.Node) -> bool:
    """Return True for a call of a layer that no rule quantizes: on parameters, or for the size of its result alone."""
    return reads_parameters(node) or (kind_of(node) in WEIGHTED and _is_called_for_sizes(node))


def _is_called_for_sizes(node: fx.Node) -> bool:
    """Return True if nothing reads the values of any call of a layer."""
    if not is_read_for_its_size(node):
        return False
    return not Op(node).is_module or all(
        is_read_for_its_size(call) for call in node.graph.nodes if call.op == node.op and call.target == node.target
    )


def _decodes_outputs(node: fx.Node) -> bool:
    """Return True for an elementwise operator that computes outputs of the model behind its last layers.

    No layer follows it. It is a product (of scores, for example), or an operand is a part or a new order of another
    tensor: two of four distances, or the rows of a feature map. A sum of whole feature maps, with which a network that
    returns an image may end, does not count.
    """
    parts = kind_of(node) is K.MULTIPLY or any(_is_rearranged(operand) for operand in node.all_input_nodes)
    return parts and not _leads_to_layer(node)


def _leads_to_layer(node: fx.Node) -> bool:
    """Return True if a layer, a product or an average reads a tensor, directly or behind other operators."""
    seen: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        reader = waiting.pop()
        if reader in seen:
            continue
        seen.add(reader)
        # A layer that decodes, such as an expectation over bins, is not one that follows.
        computes = kind_of(reader) in (*WEIGHTED, K.MATMUL, K.AVERAGE) and reason_for_float(reader) is None
        if computes or Op(reader).is_kept:  # what is kept in Python may have layers
            return True
        waiting += reader.users
    return False


def _is_expectation(node: fx.Node) -> bool:
    """Return True for a layer with a single output over a softmax: fixed bins, weighted with their probabilities.

    Generalized Focal Loss (section 3.2) and its descendants (YOLOv8's DFL, D-FINE's integral) compute it so.
    """
    shape = weight_shape(node)
    outputs = shape[0] if len(shape) > 1 else 1
    return outputs == 1 and kind_of(_unmoved_origin(node.all_input_nodes[0])) is K.SOFTMAX


def _reads_coordinates(node: fx.Node) -> bool:
    """Return True for a linear layer on at most 4 features that are a sigmoid's: positions, as parts of an image."""
    origin = Op(_unmoved_origin(node.all_input_nodes[0]))
    in_unit_interval = origin.kind is K.ACTIVATION and origin.row.results == (0.0, 1.0)
    return kind_of(node) is K.LINEAR and _input_size(node) <= MOST_COORDINATES and in_unit_interval


def _input_size(node: fx.Node) -> int:
    return weight_shape(node)[-1]


def _unmoved_origin(node: fx.Node) -> fx.Node:
    """Return the tensor that was only moved or copied to make this tensor."""
    while kind_of(node) in TRANSPARENT and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_rearranged(node: fx.Node) -> bool:
    """Return True for a tensor that is a part or a new order of another, whatever elementwise operators follow."""
    while True:
        kind = kind_of(node)
        if kind is K.CONCAT or (kind is K.SAME_SCALE and not Op(node).row.takes_maximum and not Op(node).row.window):
            return True
        if kind not in (K.ACTIVATION, K.IDENTITY, K.ADD, K.MULTIPLY) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
