"""Collect requests: the tensors of a graph to quantize, and the grids that their readers can read.

The request of an operator travels up through operators that keep the scale to the operator that produced the tensor,
past the BatchNorm and activation that a runtime fuses into it.
"""

import functools
from dataclasses import dataclass, field

from torch import fx

from halfeven.graph.cost import multiply_accumulates
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, kind_of, operations, unique_name
from halfeven.placement.decoding import reason_for_float
from halfeven.placement.feature_maps import computed_tensors, feature_maps
from halfeven.placement.rules import RuleBook
from halfeven.placement.sources import behind_convolution, head, sources
from halfeven.targets.target import GridRequirement, Target, wanted_grid

K = OperatorKind

OUTPUT = "the output"
"""Consumer of a tensor that the model returns."""

OWN_KERNEL = "its own kernel alone"
"""Consumer of a tensor that is quantized because the operator that produces it writes integers."""

ROUNDING_READER = "a reader that computes with bytes"
"""Consumer of an average that the target rounds."""


@dataclass
class QuantizationRequest:
    """The request of operators to quantize a tensor, and the grid that they can read."""

    grid: GridRequirement = GridRequirement.ANY
    consumers: list[str] = field(default_factory=list)
    tied_to: set[fx.Node] = field(default_factory=set)


@dataclass
class Region:
    """A graph of a model, with the requests that were collected in it."""

    prefix: str
    graph: fx.Graph
    names: dict[fx.Node, str]
    requests: dict[fx.Node, QuantizationRequest] = field(default_factory=dict)
    branches: set[fx.Node] = field(default_factory=set)

    @functools.cached_property
    def quantizer_names(self) -> dict[fx.Node, str]:
        """The name of each tensor's quantizer among the submodules: that of the tensor, without dots, made unique.

        The tensors "conv.1" and "conv_1" would share one otherwise. All tensors count, quantized or not, so that a rule
        changes no names.
        """
        nodes: dict[str, fx.Node] = {}
        for node, name in self.names.items():
            nodes[unique_name(name.replace(".", "_").replace(":", "_"), nodes)] = node
        return {node: name for name, node in nodes.items()}

    @functools.cached_property
    def features(self) -> set[fx.Node]:
        """The nodes that yield feature maps."""
        return feature_maps(self.graph)

    @functools.cached_property
    def computed(self) -> set[fx.Node]:
        """The nodes that are neither parameters nor made of parameters alone, without a layer."""
        return computed_tensors(self.graph)


def collect_requests(region: Region, target: Target, rules: RuleBook) -> None:
    """Collect the requests of a region's operators, in place."""
    for node in region.graph.nodes:
        kind = kind_of(node)
        if Op(node).is_output or not rules.quantizes(region.names.get(node, ""), kind, reason_for_float(node) is None):
            continue
        operands = _integer_operands(region, node, target)
        for operand in operands:
            _add_request(region, operand, wanted_grid(target, node) or GridRequirement.ANY, node)
        if operands and kind in target.outputs:
            _request_result(region, node, target)
    # Last, because an average is rounded only where its operands have been requested.
    _collect_averages(region, target, rules)


def _collect_averages(region: Region, target: Target, rules: RuleBook) -> None:
    """Request each average of integers that the target rounds because it computes the average's reader with bytes.

    With a quantizer the simulation rounds too, on the grid of that quantizer.
    """
    for node in region.graph.nodes:
        if kind_of(node) is not K.AVERAGE or not all(n in region.requests for n in sources(node.args[0])):
            continue
        if target.rounds_average(node) and rules.quantizes(region.names[node], K.AVERAGE):
            region.requests.setdefault(node, QuantizationRequest(consumers=[ROUNDING_READER]))


def collect_outputs(region: Region, rules: RuleBook) -> None:
    """Collect requests for the model's outputs, in place, because the user wants them quantized."""
    (output,) = [op.node for op in operations(region.graph) if op.is_output]
    for result in output.all_input_nodes:
        # A rule that leaves the layer before an output in float holds for the output too.
        made_by = [head(source) for source in sources(result)]
        if all(rules.quantizes(region.names.get(node, ""), kind_of(node)) for node in made_by):
            _add_request(region, result, GridRequirement.ANY, output)


def _integer_operands(region: Region, node: fx.Node, target: Target) -> list[fx.Node]:
    """Return the operands that an operator reads as integers."""
    kind = kind_of(node)
    if kind in target.elementwise:
        return _elementwise_operands(node, target, region)
    if wanted_grid(target, node) is None or multiplies_in_float(node, region.computed):
        return []
    # Both factors of a product are activations. Of a layer, the first argument alone is: weight and bias follow it.
    operands = node.all_input_nodes if kind is K.MATMUL else node.args[:1]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def multiplies_in_float(node: fx.Node, computed: set[fx.Node]) -> bool:
    """Return True for products that no runtime computes in integers: of einsum, recurrent cells, or by a parameter.

    Args:
        node: any operator.
        computed: the nodes of `computed_tensors`.
    """
    kind = kind_of(node)
    if kind is K.MATMUL:
        return not computed.issuperset(node.all_input_nodes)
    return kind is K.FLOAT and multiply_accumulates(node) > 0


def _add_request(region: Region, operand: fx.Node, grid: GridRequirement, reader: fx.Node) -> None:
    makers = [node for node in sources(operand) if Op(node).is_float_tensor and kind_of(node) is not K.CONSTANT]
    for maker in makers:
        request = region.requests.setdefault(maker, QuantizationRequest())
        # Several makers are the operands of a concatenation, which has a single scale.
        request.tied_to.update(makers)
        if (name := region.names.get(reader, OUTPUT)) not in request.consumers:
            request.consumers.append(name)
        # A reader that takes no zero point decides for all readers: they share the quantizer.
        if grid is GridRequirement.NO_ZERO_POINT:
            request.grid = grid


def _request_result(region: Region, node: fx.Node, target: Target) -> None:
    """Request the result of an operator, after the BatchNorm and activation that are computed in its kernel."""
    while len(node.users) == 1 and _is_fused(reader := next(iter(node.users)), target):
        if kind_of(reader) is K.BATCH_NORM and kind_of(node) is K.ACTIVATION and not target.fuses_any_activation:
            break  # BatchNorm can be folded only into a layer directly before it
        node = reader
    region.requests.setdefault(node, QuantizationRequest())


def _is_fused(node: fx.Node, target: Target) -> bool:
    kind = kind_of(node)
    if kind in (K.BATCH_NORM, K.IDENTITY):
        return True
    return kind is K.ACTIVATION and (target.fuses_any_activation or Op(node).bounds is not None)


def _elementwise_operands(node: fx.Node, target: Target, region: Region) -> list[fx.Node]:
    """Return the operands of an addition or multiplication that must be integers.

    A runtime may fuse a convolution with the addition of a skip connection: then the convolution's result stays in
    float, and the skip connection is quantized. If no operand comes from a convolution, as in the residual stream of a
    transformer, all operands stay in float; so do the operands of a sum with a mask or an embedding.
    """
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and Op(a).is_float_tensor]
    if len(operands) < 2 or not region.computed.issuperset(operands):
        return []  # a constant, or made of constants: a bias, a factor of each channel, a position embedding
    if kind_of(node) is K.ADD and not all(_is_feature_map(region, operand) for operand in operands):
        return []
    if target.residual_branch_in_float and Op(node).name == "add" and _same_shape(*operands):
        # Either operand may come from the convolution. x + x has no branch, and is left to the last line.
        for branch, skip in (operands, operands[::-1]):
            if branch is not skip and (end := _convolution_branch(branch)) is not None:
                region.branches.update(end)
                return [skip]
    return operands if any(behind_convolution(operand) for operand in operands) else []


def _is_feature_map(region: Region, operand: fx.Node) -> bool:
    return any(source in region.features for source in sources(operand))


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return Op(a).shape == Op(b).shape


def _convolution_branch(node: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from an addition up through BatchNorm to a convolution; None for any other branch.

    Each node has a single reader.
    """
    passed = []
    while len(node.users) == 1 and kind_of(node) in (K.IDENTITY, K.BATCH_NORM):
        passed.append(node)
        node = node.all_input_nodes[0]
    return [*passed, node] if len(node.users) == 1 and kind_of(node) is K.CONVOLUTION else None
