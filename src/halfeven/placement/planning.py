"""Deciding a plan: graph, target and options in, plan out; nothing is changed.

A tensor is quantized because an operator wants to read integers. The demand travels up through operators that keep the
scale to the operator that produced the tensor, past the BatchNorm and activation that a runtime fuses into it, and
there one quantizer serves all consumers.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from halfeven.errors import PlacementError
from halfeven.graph.operators import (
    TRANSPARENT,
    WEIGHTED,
    OperatorKind,
    is_float_tensor,
    kind_of,
    module_of,
    non_negative,
    operator_name,
    tensor_names,
)
from halfeven.graph.restoration import CapturedModule
from halfeven.observers import LOGITS
from halfeven.placement.plan import LeftInFloat, Plan, PlannedTensor, PlannedWeight, QuantizationOptions, Rule
from halfeven.placement.rules import RuleBook
from halfeven.placement.targets import Grid, Target, target_named, wanted_grid
from halfeven.quantizer import Ranges
from halfeven.scheme import Scheme, parse_bits

K = OperatorKind

OUTPUT = "the output"
"""Who reads a tensor that the model returns."""


def regions(model: nn.Module) -> dict[str, CapturedModule]:
    """The captured parts of a model by name; "" is the whole."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CapturedModule)}


def qualified(region: str, name: str) -> str:
    """The name of a tensor or layer in a model: "region:name", or the name alone where the whole model is one
    region."""
    return f"{region}:{name}" if region else name


def named_nodes(model: nn.Module) -> dict[str, tuple[CapturedModule, fx.Node]]:
    """All tensors of a model by their qualified names, each with its region and the node that makes it."""
    return {
        qualified(prefix, name): (region, node)
        for prefix, region in regions(model).items()
        for name, node in tensor_names(region.graph).items()
    }


@dataclass
class _Demand:
    """A tensor that shall be quantized, and what its readers ask."""

    grid: Grid = Grid.ANY
    consumers: list[str] = field(default_factory=list)
    tied_to: set[fx.Node] = field(default_factory=set)


@dataclass
class _Region:
    """One graph, with the lookups that deciding needs."""

    prefix: str
    graph: fx.Graph
    names: dict[fx.Node, str]
    demands: dict[fx.Node, _Demand] = field(default_factory=dict)
    branches: set[fx.Node] = field(default_factory=set)


def make_plan(model: nn.Module, options: QuantizationOptions, notes: tuple[str, ...] = ()) -> Plan:
    """Decide what to quantize in a captured model.

    Raises:
        PlacementError: the target cannot do the scheme, or a rule held for nothing.
    """
    target, rules = target_named(options.target), RuleBook((*_ends(model, options), *options.rules))
    weight_bits, activation_bits = parse_bits(options.scheme)
    _check_bits(target, options, weight_bits, activation_bits)
    tensors: list[PlannedTensor] = []
    weights: list[PlannedWeight] = []
    left: list[LeftInFloat] = []
    known: list[str] = []
    _check_outputs(model, options)
    for prefix, module in regions(model).items():
        names = {node: qualified(prefix, name) for name, node in tensor_names(module.graph).items()}
        region = _Region(prefix, module.graph, names)
        known += names.values()
        _collect_demands(region, target, rules)
        if options.quantize_outputs:
            _demand_outputs(region, rules)
        tensors += _planned_tensors(region, options, rules, activation_bits)
        weights += _planned_weights(region, options, rules, weight_bits)
        left += _left(region, rules)
    rules.check_all_used(known)
    if not weights:
        raise PlacementError(
            "No layer of this model would be quantized: it has no convolution or linear layer that was captured, or "
            "the rules "
            "leave all of them in float. Look at the rules and at leave_out."
        )
    return Plan(options=options, tensors=tuple(tensors), weights=tuple(weights), left=tuple(left), notes=notes)


def _check_bits(target: Target, options: QuantizationOptions, weight_bits: int, activation_bits: int) -> None:
    asked = [("weights", weight_bits, target.weight_bits), ("activations", activation_bits, target.activation_bits)]
    for rule in options.rules:
        asked += [("weights", rule.weight_bits or weight_bits, target.weight_bits)]
        asked += [("activations", rule.activation_bits or activation_bits, target.activation_bits)]
    for what, bits, allowed in asked:
        if bits not in allowed:
            raise PlacementError(
                f"{target.name} cannot run {what} of {bits} bits in integers (it can from {allowed[0]} to "
                f"{allowed[-1]}), so "
                "such a model would not be what runs. Choose other bits."
            )


def _ends(model: nn.Module, options: QuantizationOptions) -> tuple[Rule, ...]:
    """Rules for the first and the last layer, which come before the user's."""
    bits = options.first_and_last_bits
    layers = [(name, node) for name, (_, node) in named_nodes(model).items() if kind_of(node) in WEIGHTED]
    if not bits or not layers:
        return ()
    (first, first_node), (last, last_node) = layers[0], layers[-1]
    read = {name for name, (_, node) in named_nodes(model).items() for end in (first_node, last_node)
            if node in [_head(source) for source in _sources(end.all_input_nodes[0])]}  # fmt: skip
    weights = [Rule(pattern=glob.escape(name), weight_bits=bits) for name in dict.fromkeys((first, last))]
    return (*weights, *(Rule(pattern=glob.escape(name), activation_bits=bits) for name in sorted(read)))


def _check_outputs(model: nn.Module, options: QuantizationOptions) -> None:
    if options.quantize_outputs and "" not in regions(model):
        raise PlacementError(
            "quantize_outputs=True was asked for, and this model was captured in parts "
            f"({', '.join(regions(model))}): its outputs come from Python, where no quantizer can be. Set "
            "quantize_outputs=False, or capture the model whole."
        )


# Who wants integers


def _collect_demands(region: _Region, target: Target, rules: RuleBook) -> None:
    for node in region.graph.nodes:
        kind = kind_of(node)
        quantize = node.op != "output" and rules.for_operator(region.names.get(node, ""), kind).quantize
        if not quantize:
            continue
        if kind is K.ADD:
            for operand in _addition_operands(node, target, region):
                _demand(region, operand, Grid.ANY, node)
        elif (grid := wanted_grid(target, node)) is not None:
            operands = node.all_input_nodes if kind is K.MATMUL else [node.args[0]]
            for operand in operands:
                _demand(region, operand, grid, node)


def _demand_outputs(region: _Region, rules: RuleBook) -> None:
    (output,) = [node for node in region.graph.nodes if node.op == "output"]
    for result in output.all_input_nodes:
        made_by = [_head(source) for source in _sources(result)]
        if all(rules.for_operator(region.names.get(node, ""), kind_of(node)).quantize for node in made_by):
            _demand(region, result, Grid.ANY, output)


def _demand(region: _Region, operand: object, grid: Grid, reader: fx.Node) -> None:
    assert isinstance(operand, fx.Node)
    sources = [node for node in _sources(operand) if is_float_tensor(node) and kind_of(node) is not K.CONSTANT]
    for source in sources:
        demand = region.demands.setdefault(source, _Demand())
        demand.tied_to.update(sources)
        if (name := region.names.get(reader, OUTPUT)) not in demand.consumers:
            demand.consumers.append(name)
        if grid is Grid.NO_ZERO_POINT:
            demand.grid = grid


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The operators that made the values of a tensor: upwards through all that keeps the scale."""
    kind = kind_of(node)
    if kind is K.CONCAT:
        for operand in node.all_input_nodes:
            yield from _sources(operand)
    elif kind in TRANSPARENT:
        yield from _sources(node.all_input_nodes[0])
    else:
        yield node


def _addition_operands(node: fx.Node, target: Target, region: _Region) -> list[fx.Node]:
    """The operands of an addition that shall be integers.

    A convolution that is added to a skip connection is fused with the addition: its result stays as it is, the skip is
    quantized. Additions that no convolution leads to (the residual stream of a transformer) stay in float.
    """
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and is_float_tensor(a)]
    if len(operands) < 2 or any(kind_of(o) is K.CONSTANT for o in operands):
        return []
    if target.residual_branch_in_float and operator_name(node) == "add" and _same_shape(*operands):
        for branch, skip in (operands, operands[::-1]):
            if branch is not skip and (end := _convolution_branch(branch)) is not None:
                region.branches.update(end)
                return [skip]
    heads = [kind_of(_head(source)) for operand in operands for source in _sources(operand)]
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


def _head(node: fx.Node) -> fx.Node:
    """The operator that an activation and a BatchNorm at the end of a fused group belong to."""
    while kind_of(node) in (K.ACTIVATION, K.BATCH_NORM) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


# From demands to planned tensors


def _planned_tensors(
    region: _Region, options: QuantizationOptions, rules: RuleBook, bits: int
) -> Iterator[PlannedTensor]:
    done: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node not in region.demands or node in done:
            continue
        group = _tied(region, node)
        done |= group
        places = [n for n in region.graph.nodes if n in group]
        rule = rules.for_operator(region.names[_head(node)], kind_of(_head(node)))
        consumers = dict.fromkeys(c for n in places for c in region.demands[n].consumers)
        fixed = (0.0, 1.0) if all(kind_of(n) is K.SOFTMAX for n in places) else None
        yield PlannedTensor(
            name=region.names[node].replace(".", "_").replace(":", "_"),
            places=tuple(region.names[n] for n in places),
            scheme=_activation_scheme(region, places, rule.activation_bits or bits),
            ranges=_ranges(places, options, rule.activation_bits or bits) if fixed is None else "calibrated",
            observer=LOGITS if _logits(region, places, options) else options.activation_observer,
            fixed_range=fixed,
            consumers=tuple(consumers),
        )


def _ranges(places: list[fx.Node], options: QuantizationOptions, bits: int) -> Ranges:
    """What sets the range in training. An input of 8 bits or more stays as calibrated where others are learned: images
    do not change, and a gradient for its scale costs the first layer's backward pass for its input."""
    learned = options.ranges in ("learned", "clipped")
    return "calibrated" if learned and bits >= 8 and all(n.op == "placeholder" for n in places) else options.ranges


def _logits(region: _Region, places: list[fx.Node], options: QuantizationOptions) -> bool:
    """Whether a tensor is the scores of classes, [samples, classes], and nothing but an output of the model.

    Their range is chosen by cross-entropy where that of the others is by an error; a user who wants the extremes, say,
    wants them of all tensors.
    """
    (node, *others) = places
    if others or region.demands[node].consumers != [OUTPUT] or options.activation_observer not in ("mse", "lp"):
        return False
    classes, *rest = node.meta["val"].shape[1:] or (1,)
    return kind_of(node) in (K.LINEAR, K.AVERAGE) and classes > 1 and all(size == 1 for size in rest)


def _tied(region: _Region, node: fx.Node) -> set[fx.Node]:
    """All tensors that share a scale with this one because they are concatenated somewhere."""
    group, waiting = {node}, [node]
    while waiting:
        for other in region.demands[waiting.pop()].tied_to - group:
            group.add(other)
            waiting.append(other)
    return group


def _activation_scheme(region: _Region, places: list[fx.Node], bits: int) -> Scheme:
    if all(non_negative(node) for node in places):
        return Scheme(bits=bits, signed=False, symmetric=True)
    if any(region.demands[node].grid is Grid.NO_ZERO_POINT for node in places):
        return Scheme(bits=bits, signed=True, symmetric=True)
    return Scheme(bits=bits, signed=False, symmetric=False)


def _planned_weights(
    region: _Region, options: QuantizationOptions, rules: RuleBook, bits: int
) -> Iterator[PlannedWeight]:
    seen: set[object] = set()
    for node in region.graph.nodes:
        kind = kind_of(node)
        if kind not in WEIGHTED or (node.op == "call_module" and node.target in seen):
            continue
        seen.add(node.target if node.op == "call_module" else node)
        rule = rules.for_operator(region.names[node], kind)
        if not rule.quantize:
            continue
        axis = (1 if kind is K.TRANSPOSED_CONVOLUTION else 0) if options.per_channel else None
        shape = weight_shape(node)
        if axis == 1 and _groups(node) > 1:
            axis = None  # the channels of a grouped transposed convolution are not an axis of its weight
        yield PlannedWeight(
            name=region.names[node],
            scheme=Scheme(bits=rule.weight_bits or bits, signed=True, symmetric=True, narrow=True, axis=axis),
            channels=None if axis is None else shape[axis],
            ranges="learned" if options.ranges == "clipped" else options.ranges,
            observer=_weight_observer(options, rule.weight_bits or bits),
        )


def _weight_observer(options: QuantizationOptions, bits: int) -> str:
    if options.weight_observer != "auto":
        return options.weight_observer
    return "minmax" if bits >= 8 else "mse"


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the weight of a layer, be it a module or a function."""
    if node.op == "call_module":
        weight = module_of(node).weight
        return tuple(int(size) for size in weight.shape)  # type: ignore[union-attr]
    weight_node = node.args[1]
    assert isinstance(weight_node, fx.Node)
    return tuple(int(size) for size in weight_node.meta["val"].shape)


def _groups(node: fx.Node) -> int:
    if node.op == "call_module":
        return int(module_of(node).groups)  # type: ignore[arg-type]
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


# What stays in float, and why


def _left(region: _Region, rules: RuleBook) -> Iterator[LeftInFloat]:
    for node in region.graph.nodes:
        kind = kind_of(node)
        if kind in (K.OUTPUT, K.CONSTANT, K.CONCAT, *TRANSPARENT) or node in region.demands:
            continue
        if not is_float_tensor(node):
            continue
        name = region.names[node]
        reason = None
        if not rules.for_operator(name, kind).quantize:
            reason = "a rule says so"
        elif node in region.branches:
            if kind is K.CONVOLUTION:
                reason = "fused with the addition that reads it, which would drop the rounding of a quantizer here"
        elif kind is K.FLOAT:
            reason = "no row of the operator table says how it treats scales"
        elif _fused_into_reader(node):
            continue
        else:
            reason = _unread(node)
        if reason is not None:
            yield LeftInFloat(name=name, operator=operator_name(node), reason=reason)


def _fused_into_reader(node: fx.Node) -> bool:
    return len(node.users) == 1 and kind_of(next(iter(node.users))) in (K.BATCH_NORM, K.ACTIVATION)


def _unread(node: fx.Node) -> str:
    readers = list(dict.fromkeys(operator_name(user) for user in node.users if user.op != "output"))
    if not readers:
        return "an output of the model"
    return f"its readers compute in float ({', '.join(readers)})"
