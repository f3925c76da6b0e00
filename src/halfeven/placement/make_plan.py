"""Decide a plan from a graph, a target and options; nothing is changed.

A tensor is quantized because an operator reads integers. The request travels up through operators that keep the scale
to the operator that produced the tensor, past the BatchNorm and activation that a runtime fuses into it; a single
quantizer there serves all consumers.
"""

import copy
import glob
from collections.abc import Iterator

from torch import Tensor, fx, nn

from halfeven.errors import PlacementError
from halfeven.graph.layer_shapes import groups_of, weight_shape
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, kind_of, tensor_names
from halfeven.placement.decoding import has_no_integers, reason_for_float
from halfeven.placement.gates import check_gates
from halfeven.placement.grids import activation_scheme, check_power_of_two, kinds_behind, simulated_alone
from halfeven.placement.options import QuantizationOptions, Rule
from halfeven.placement.plan import NOTHING_FOUND, FoundInCapture, LeftInFloat, Plan, PlannedTensor, PlannedWeight
from halfeven.placement.ranges import ranges_in_training
from halfeven.placement.requests import (
    OUTPUT,
    OWN_KERNEL,
    Region,
    collect_outputs,
    collect_requests,
    multiplies_in_float,
)
from halfeven.placement.rules import RuleBook
from halfeven.placement.sources import fused_group, head, sources
from halfeven.quantization.observers import LOGITS
from halfeven.quantization.own_class import OwnClass
from halfeven.quantization.quantizer import Ranges
from halfeven.quantization.scheme import BITS_NAMED_FOR_FLOAT, MAX_BITS, Scheme, parse_bits
from halfeven.targets.target import Target

K = OperatorKind


def regions(model: nn.Module) -> dict[str, CapturedModule]:
    """Return the captured parts of a model by name; "" is the whole model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CapturedModule)}


def qualified(region: str, name: str) -> str:
    """Return the name of a tensor or layer in a model: "region:name", or the name alone in a model captured whole."""
    return f"{region}:{name}" if region else name


def named_nodes(model: nn.Module) -> dict[str, tuple[CapturedModule, fx.Node]]:
    """Return all tensors of a model by their qualified names, each with its region and the node that makes it."""
    return {
        qualified(prefix, name): (region, node)
        for prefix, region in regions(model).items()
        for name, node in tensor_names(region.graph).items()
    }


def make_plan(
    model: nn.Module, options: QuantizationOptions, target: Target, found: FoundInCapture = NOTHING_FOUND
) -> Plan:
    """Decide what to quantize in a captured model for a target.

    Raises:
        PlacementError: the target cannot do the scheme, or a rule held for nothing.
    """
    ends = _end_layer_rules(model, options)
    rules = RuleBook(options.rules, ends)
    weight_bits, activation_bits = parse_bits(options.scheme)
    if activation_bits == BITS_NAMED_FOR_FLOAT:
        _check_weights_alone(target, options, weight_bits, ends)
    else:
        _check_bits(target, (*ends, *options.rules), weight_bits, activation_bits)
    # The kinds of layers whose weights are integers: with activations in float, those with a kernel that unpacks them.
    kinds = frozenset(target.stored_weights if activation_bits == BITS_NAMED_FOR_FLOAT else target.inputs)
    tensors: list[PlannedTensor] = []
    weights: list[PlannedWeight] = []
    left: list[LeftInFloat] = []
    known: list[str] = []
    _check_outputs(model, options)
    check_gates(options, target, activation_bits)
    for prefix, module in regions(model).items():
        names = {node: qualified(prefix, name) for name, node in tensor_names(module.graph).items()}
        region = Region(prefix, module.graph, names)
        # Requests come first: they decide which tensors and weights are quantized, and so what is left.
        known += names.values()
        if activation_bits != BITS_NAMED_FOR_FLOAT:
            collect_requests(region, target, rules)
        if options.quantize_outputs:
            collect_outputs(region, rules)
        tensors += _planned_tensors(region, options, rules, target, activation_bits)
        weights += _planned_weights(region, options, rules, target, kinds, weight_bits)
        left += _left_in_float(region, rules, target, kinds)
    # A rule takes effect where one of its fields is looked up, so only now all of them had their chance.
    rules.check_all_used(known)
    if not weights:
        raise PlacementError(
            "No layer of this model would be quantized, so all of its products would run in float: no "
            "convolution or linear layer was captured, or the rules leave all of them in float, or "
            f"{target.name} has no integer kernel for their shapes, or a slower one. Check the rules and leave_out."
        )
    return Plan(
        options=options,
        tensors=tuple(tensors),
        weights=tuple(weights),
        left=tuple(left),
        notes=found.notes,
        kept=found.kept,
        simulated=simulated_alone(tensors, target),
        decide=lambda other: make_plan(model, other, target, found),
    )


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a captured model without the values of its tensors, which decisions do not read."""
    # `deepcopy` takes an object's copy from its memo where there is any, by identity: so no values are copied, and tied
    # parameters stay tied.
    empty: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, empty)


def _check_bits(target: Target, rules: tuple[Rule, ...], weight_bits: int, activation_bits: int) -> None:
    """Refuse bits that the target cannot run, with a PlacementError.

    Args:
        target: the runtime.
        rules: those for the first and the last layer, and the user's.
        weight_bits: the scheme's bits of weights.
        activation_bits: the scheme's bits of activations.
    """
    # A rule may give an activation more bits than the target runs: it is simulated alone, and the plan says so.
    simulated = range(max(target.activation_bits) + 1, MAX_BITS + 1)
    in_rules = {rule.activation_bits for rule in rules} - {*simulated}
    for what, allowed, asked in (
        ("weights", target.weight_bits, {weight_bits, *(rule.weight_bits for rule in rules)}),
        ("activations", target.activation_bits, {activation_bits, *in_rules}),
    ):
        if refused := asked - {None, *allowed}:
            raise PlacementError(
                f"{target.name} cannot run {what} of {refused.pop()} bits in integers (it can from {allowed[0]} to "
                f"{allowed[-1]}), so the deployed model would differ from the quantized model. Choose other bits."
            )


def _check_weights_alone(
    target: Target, options: QuantizationOptions, weight_bits: int, ends: tuple[Rule, ...]
) -> None:
    """Refuse options that a scheme of weights alone cannot follow, with a PlacementError."""
    # Of the rules for the first and the last layer the bits of weights alone matter: what these read stays in float.
    asked = {weight_bits, *(r.weight_bits for r in (*ends, *options.rules) if r.weight_bits is not None)}
    allowed = sorted({bits for kind in target.stored_weights.values() for bits in kind})
    if not asked <= set(allowed):
        widths = " or ".join(str(bits) for bits in allowed)
        raise PlacementError(
            f"{target.name} cannot run weights of {min(asked - set(allowed))} bits with activations in floating point "
            f'("{options.scheme}"): {f"it takes weights of {widths} bits there" if allowed else "it has no such row"}, '
            "so the deployed model would differ from the quantized model. Choose other bits or another target."
        )
    if options.quantize_outputs or any(rule.activation_bits is not None for rule in options.rules):
        raise PlacementError(
            f'"{options.scheme}" leaves all activations in floating point, and quantize_outputs or a rule asks for '
            "integers, so the options contradict each other. Leave these out, or choose a scheme with activations of "
            "8 bits."
        )


def _end_layer_rules(model: nn.Module, options: QuantizationOptions) -> tuple[Rule, ...]:
    """Return the rules for the first and the last layer, which come before the user's rules."""
    bits = options.first_and_last_bits
    nodes = [(name, node) for name, (_, node) in named_nodes(model).items()]
    layers = [(name, node) for name, node in nodes if kind_of(node) in WEIGHTED and not has_no_integers(node)]
    if bits == "auto" or not layers:
        return ()
    first, first_node = layers[0]
    last, last_node = layers[-1]
    # A layer's input has the bits of the operator that makes it, so the rules for activations name that operator.
    read = {name for name, (_, node) in named_nodes(model).items() for end in (first_node, last_node)
            if node in [head(source) for source in sources(end.all_input_nodes[0])]}  # fmt: skip
    # Escaped, because a pattern has wildcards, and a name stands for itself.
    weights = [Rule(pattern=glob.escape(name), weight_bits=bits) for name in dict.fromkeys((first, last))]
    return (*weights, *(Rule(pattern=glob.escape(name), activation_bits=bits) for name in sorted(read)))


def _check_outputs(model: nn.Module, options: QuantizationOptions) -> None:
    if options.quantize_outputs and "" not in regions(model):
        raise PlacementError(
            "quantize_outputs=True needs a model that was captured whole, and this model was captured in parts "
            f"({', '.join(regions(model))}): its outputs come from Python, where no quantizer can be. Set "
            "quantize_outputs=False, or change the model so that it is captured whole."
        )


# From requests to planned tensors


def _planned_tensors(
    region: Region, options: QuantizationOptions, rules: RuleBook, target: Target, bits: int
) -> Iterator[PlannedTensor]:
    """Yield an entry for each group of requested tensors that share a quantizer."""
    done: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node not in region.requests or node in done:
            continue
        # Tensors that are concatenated have a single quantizer, and so a single entry.
        group = _sharing_scale_with(region, node)
        done |= group
        # In the order of the graph: a set has none, and the first place gives the quantizer its name.
        places = [n for n in region.graph.nodes if n in group]
        fused = {region.names[member]: kind_of(member) for place in places for member in fused_group(place)}
        scheme = activation_scheme(region, places, rules, fused, target, bits)
        consumers = dict.fromkeys(c for n in places for c in region.requests[n].consumers)
        # Probabilities lie between 0 and 1 whatever the data, so their range needs no calibration.
        fixed = (0.0, 1.0) if all(kind_of(n) is K.SOFTMAX for n in places) else None
        yield PlannedTensor(
            name=region.quantizer_names[node],
            places=tuple(region.names[n] for n in places),
            scheme=scheme,
            ranges="calibrated"
            if fixed
            else rules.chosen("ranges", fused, _range_movement(places, options, scheme.bits)),
            observer=rules.chosen("observer", fused, _activation_observer(region, places, options)),
            quantizer=rules.chosen("quantizer", fused, None),
            fixed_range=fixed,
            consumers=tuple(consumers) or (OWN_KERNEL,),
        )


def _range_movement(places: list[fx.Node], options: QuantizationOptions, bits: int) -> Ranges:
    """Return how the range is set in training.

    The range of an input of 8 bits or more stays as calibrated where other ranges are learned: images do not change,
    and a gradient for its scale needs the first layer's backward pass for its input.
    """
    ranges = ranges_in_training(options, bits)
    learned = ranges in ("learned", "clipped")
    return "calibrated" if learned and bits >= 8 and all(Op(node).is_input for node in places) else ranges


def _activation_observer(region: Region, places: list[fx.Node], options: QuantizationOptions) -> str | OwnClass:
    return LOGITS if _are_class_scores(region, places, options) else options.activation_observer


def _are_class_scores(region: Region, places: list[fx.Node], options: QuantizationOptions) -> bool:
    """Return True for class scores, [samples, classes], that only the model's output reads.

    Their range is estimated by cross-entropy where the other activations' are estimated by an error norm ("mse" or
    "lp"); any other observer that the user chooses holds for all tensors.
    """
    (node, *further) = places
    readers = region.requests[node].consumers or [OUTPUT for reader in Op(node).readers if reader.is_output]
    if further or readers != [OUTPUT] or options.activation_observer not in ("mse", "lp"):
        return False
    classes, *rest = Op(node).shape[1:] or (1,)
    return kind_of(node) in (K.LINEAR, K.AVERAGE) and classes > 1 and all(size == 1 for size in rest)


def _sharing_scale_with(region: Region, node: fx.Node) -> set[fx.Node]:
    """Return all tensors that share a scale with this tensor because they are concatenated somewhere."""
    group = {node}
    waiting = [node]
    while waiting:
        for other in region.requests[waiting.pop()].tied_to - group:
            group.add(other)
            waiting.append(other)
    return group


def _planned_weights(
    region: Region,
    options: QuantizationOptions,
    rules: RuleBook,
    target: Target,
    kinds: frozenset[OperatorKind],
    bits: int,
) -> Iterator[PlannedWeight]:
    """Yield an entry for the weight of each layer that computes in integers; a layer called twice has one entry."""
    seen: set[object] = set()
    for node in region.graph.nodes:
        kind = kind_of(node)
        if kind not in WEIGHTED or kind not in kinds or (Op(node).is_module and node.target in seen):
            continue
        quantize = rules.quantizes(region.names[node], kind, reason_for_float(node) is None)
        if not quantize and has_no_integers(node):
            continue  # a later call of the layer may have some
        seen.add(node.target if Op(node).is_module else node)
        if not quantize or target.stays_in_float(node) is not None:
            continue
        own = {region.names[node]: kind}
        asked = rules.chosen("weight_bits", own, bits)
        per_channel = rules.chosen("per_channel", own, options.per_channel)
        # A transposed convolution has its weight as [inputs, outputs / groups, ...], any other layer as [outputs, ...].
        axis = (1 if kind is K.TRANSPOSED_CONVOLUTION else 0) if per_channel else None
        shape = weight_shape(node)
        if axis == 1 and groups_of(node) > 1:
            axis = None  # the channels of a grouped transposed convolution are not an axis of its weight
        power_of_two = rules.chosen("power_of_two", own, False)
        if power_of_two:
            check_power_of_two(region.names[node], kinds_behind(node), options)
        # PACT learns the range of an activation. Weights learn their scales beside it, as in LSQ.
        ranges = rules.chosen("ranges", own, ranges_in_training(options, asked))
        yield PlannedWeight(
            name=region.names[node],
            # White paper, section 2.4.1: weights have no zero point, which would cost a correction of every product.
            scheme=Scheme(bits=asked, signed=True, symmetric=True, narrow=True, axis=axis, power_of_two=power_of_two),
            channels=None if axis is None else shape[axis],
            ranges="learned" if ranges == "clipped" else ranges,
            observer=rules.chosen("observer", own, _weight_observer(options, asked)),
            quantizer=rules.chosen("quantizer", own, None),
            operator=f"{Op(node).name}, depthwise" if groups_of(node) == shape[0] > 1 else Op(node).name,
        )


def _weight_observer(options: QuantizationOptions, bits: int) -> str | OwnClass:
    if options.weight_observer != "auto":
        return options.weight_observer
    return "minmax" if bits >= 8 else "mse"


# What stays in float, and why


def _left_in_float(
    region: Region, rules: RuleBook, target: Target, kinds: frozenset[OperatorKind]
) -> Iterator[LeftInFloat]:
    """Yield the operators that could compute in integers, or have integer results, and do not, with their reasons."""
    for node in region.graph.nodes:
        kind = kind_of(node)
        # Layers that the target cannot run in integers, whatever the rules say.
        if kind in WEIGHTED and kind not in kinds:
            lacks = "has no integer kernel for it" if kinds == set(target.inputs) else "reads no integer weights here"
            yield LeftInFloat(name=region.names[node], operator=Op(node).name, reason=f"{target.name} {lacks}")
            continue
        if kind in WEIGHTED and (reason := target.stays_in_float(node)) is not None:
            yield LeftInFloat(name=region.names[node], operator=Op(node).name, reason=f"{target.name} {reason}")
            continue
        if kinds != set(target.inputs) and kind not in WEIGHTED:
            continue  # all are in float, as the scheme says
        if kind in (K.OUTPUT, K.CONSTANT, K.CONCAT, *TRANSPARENT) or node not in region.computed:
            continue  # nothing is computed, or the same for every sample
        if Op(node).takes_result or not (Op(node).yields_floats or Op(node).is_kept):
            continue
        # What could run in integers, and by a rule or by its readers does not.
        if (reason := _reason_for_float(region, node, rules)) is not None:
            yield LeftInFloat(name=region.names[node], operator=Op(node).name, reason=reason)


def _reason_for_float(region: Region, node: fx.Node, rules: RuleBook) -> str | None:
    """Return the reason why an operator computes in float, or its result is not quantized; None where neither holds."""
    kind = kind_of(node)
    if multiplies_in_float(node, region.computed):
        return "only layers and products (matmul) of two activations become integers, and this is another product"
    reason = reason_for_float(node)
    in_float = not rules.quantizes(region.names[node], kind, reason is None)
    if node in region.requests:
        return reason if in_float and kind in WEIGHTED else None
    if in_float:
        return reason or "a rule says so"
    if node in region.branches:  # the fusion would drop the rounding of a quantizer here
        fused = "fused with the addition that reads it"
        return fused if kind is K.CONVOLUTION else None
    if Op(node).is_kept:
        return "its own code stays Python, for training"
    if kind is K.FLOAT:
        return "no row of the operator table says how it treats scales"
    return None if _fused_into_reader(node) else _reason_unread(node, region.prefix)


def _fused_into_reader(node: fx.Node) -> bool:
    return len(node.users) == 1 and kind_of(next(iter(node.users))) in (K.BATCH_NORM, K.ACTIVATION)


def _reason_unread(node: fx.Node, part: str) -> str:
    readers = list(dict.fromkeys(Op(reader).name for reader in sorted(node.users) if kind_of(reader) is not K.OUTPUT))
    if not readers:
        return f"an output of {part}, which is captured by itself" if part else "an output of the model"
    return f"its readers compute in float ({', '.join(readers)})"
