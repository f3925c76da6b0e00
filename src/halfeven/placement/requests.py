"""Who wants integers: the tensors of a graph that shall be quantized, and what their readers ask of them.

The demand of an operator travels up through operators that keep the scale to the operator that produced the tensor,
past the BatchNorm and activation that a runtime fuses into it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from halfeven.graph.operators import TRANSPARENT, OperatorKind
from halfeven.graph.view import Op, kind_of
from halfeven.placement.rules import RuleBook
from halfeven.targets.target import Grid, Target, wanted_grid

K = OperatorKind

OUTPUT = "the output"
"""Who reads a tensor that the model returns."""

ITSELF = "its own kernel alone"
"""Who needs a tensor in integers that is quantized for the sake of the operator that makes it."""

ROUNDED = "a reader that computes with bytes"
"""Who makes the target round an average."""


@dataclass
class Demand:
    """A tensor that shall be quantized, and what its readers ask."""

    grid: Grid = Grid.ANY
    consumers: list[str] = field(default_factory=list)
    tied_to: set[fx.Node] = field(default_factory=set)


@dataclass
class Region:
    """One graph, with the lookups that deciding needs."""

    prefix: str
    graph: fx.Graph
    names: dict[fx.Node, str]
    demands: dict[fx.Node, Demand] = field(default_factory=dict)
    branches: set[fx.Node] = field(default_factory=set)


def collect(region: Region, target: Target, rules: RuleBook) -> None:
    """Fill a region's demands with those of its operators."""
    for node in region.graph.nodes:
        kind = kind_of(node)
        quantize = node.op != "output" and rules.quantizes(region.names.get(node, ""), kind)
        if not quantize:
            continue
        operands = _integer_operands(region, node, target)
        for operand in operands:
            _demand(region, operand, wanted_grid(target, node) or Grid.ANY, node)
        if operands and kind in target.outputs:
            _demand_result(region, node, target)
    _collect_averages(region, target, rules)


def _collect_averages(region: Region, target: Target, rules: RuleBook) -> None:
    """Demand the averages of integers that the target rounds for a reader that it computes with bytes: with a quantizer
    the simulation rounds too, and on a grid of the average's own."""
    for node in region.graph.nodes:
        if kind_of(node) is not K.AVERAGE or not all(n in region.demands for n in sources(node.args[0])):
            continue
        if target.rounds_average(node) and rules.quantizes(region.names[node], K.AVERAGE):
            region.demands.setdefault(node, Demand(consumers=[ROUNDED]))


def collect_outputs(region: Region, rules: RuleBook) -> None:
    """Add the demands of a user who wants the model's outputs quantized."""
    (output,) = [node for node in region.graph.nodes if node.op == "output"]
    for result in output.all_input_nodes:
        made_by = [head(source) for source in sources(result)]
        if all(rules.quantizes(region.names.get(node, ""), kind_of(node)) for node in made_by):
            _demand(region, result, Grid.ANY, output)


def _integer_operands(region: Region, node: fx.Node, target: Target) -> list[fx.Node]:
    """The operands that an operator wants to read as integers."""
    kind = kind_of(node)
    if kind in target.elementwise:
        return _elementwise_operands(node, target, region)
    if wanted_grid(target, node) is None:
        return []
    operands = node.all_input_nodes if kind is K.MATMUL else node.args[:1]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _demand(region: Region, operand: fx.Node, grid: Grid, reader: fx.Node) -> None:
    makers = [node for node in sources(operand) if Op(node).is_float_tensor and kind_of(node) is not K.CONSTANT]
    for maker in makers:
        demand = region.demands.setdefault(maker, Demand())
        demand.tied_to.update(makers)
        if (name := region.names.get(reader, OUTPUT)) not in demand.consumers:
            demand.consumers.append(name)
        if grid is Grid.NO_ZERO_POINT:
            demand.grid = grid


def _demand_result(region: Region, node: fx.Node, target: Target) -> None:
    """Quantize what an operator yields, after the BatchNorm and activation that are computed in its kernel."""
    while len(node.users) == 1 and _fused(reader := next(iter(node.users)), target):
        if kind_of(reader) is K.BATCH_NORM and kind_of(node) is K.ACTIVATION and not target.fuses_any_activation:
            break  # it can be folded into a layer right before it alone
        node = reader
    region.demands.setdefault(node, Demand())


def _fused(node: fx.Node, target: Target) -> bool:
    kind = kind_of(node)
    if kind in (K.BATCH_NORM, K.IDENTITY):
        return True
    return kind is K.ACTIVATION and (target.fuses_any_activation or Op(node).bounds is not None)


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """The operators that made the values of a tensor: upwards through all that keeps the scale."""
    kind = kind_of(node)
    if kind is K.CONCAT:
        for operand in node.all_input_nodes:
            yield from sources(operand)
    elif kind in TRANSPARENT:
        yield from sources(node.all_input_nodes[0])
    else:
        yield node


def _elementwise_operands(node: fx.Node, target: Target, region: Region) -> list[fx.Node]:
    """The operands of an addition or multiplication that shall be integers.

    A convolution that is added to a skip connection may be fused with the addition: then its result stays as it is,
    and the skip is quantized. Where no convolution leads (the residual stream of a transformer) all stay in float.
    """
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and Op(a).is_float_tensor]
    if len(operands) < 2 or any(kind_of(o) is K.CONSTANT for o in operands):
        return []
    if target.residual_branch_in_float and Op(node).name == "add" and _same_shape(*operands):
        for branch, skip in (operands, operands[::-1]):
            if branch is not skip and (end := _convolution_branch(branch)) is not None:
                region.branches.update(end)
                return [skip]
    heads = [kind_of(head(source)) for operand in operands for source in sources(operand)]
    return operands if K.CONVOLUTION in heads or K.TRANSPOSED_CONVOLUTION in heads else []


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].shape == b.meta["val"].shape)


def _convolution_branch(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from a convolution, through BatchNorm, to an addition that alone reads them; None if it is no such
    branch."""
    passed = []
    while len(node.users) == 1 and kind_of(node) in (K.IDENTITY, K.BATCH_NORM):
        passed.append(node)
        node = node.all_input_nodes[0]
    return [*passed, node] if len(node.users) == 1 and kind_of(node) is K.CONVOLUTION else None


def fused_group(node: fx.Node) -> list[fx.Node]:
    """An operator with the BatchNorm and the activation that precede it in its fused group, last to first."""
    group = [node]
    while kind_of(group[-1]) in (K.ACTIVATION, K.BATCH_NORM) and group[-1].all_input_nodes:
        group.append(group[-1].all_input_nodes[0])
    return group


def head(node: fx.Node) -> fx.Node:
    """The operator that an activation and a BatchNorm at the end of a fused group belong to."""
    return fused_group(node)[-1]
