"""Insert a plan's quantizers into a captured model; none is inserted only to be deleted again."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

from torch import fx, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import PlacementError
from halfeven.graph.batches import Inputs
from halfeven.graph.layer_shapes import weight_shape
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import in_backward_pass
from halfeven.graph.tree import place
from halfeven.graph.view import Op, kind_of, module_calls
from halfeven.graph.wrappers import unwrapped
from halfeven.placement.channel_affine import ChannelAffine
from halfeven.placement.execution_graph import fused_graph
from halfeven.placement.folded_batchnorm import fold_live
from halfeven.placement.frozen import freeze_scales
from halfeven.placement.make_plan import make_plan, named_nodes, regions, skeleton
from halfeven.placement.options import QuantizationOptions
from halfeven.placement.plan import FoundInCapture, Plan, PlannedTensor, PlannedWeight
from halfeven.placement.quantized_layers import QUANTIZED_LAYERS, QuantizedLayer
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.shared_ranges import share_ranges
from halfeven.targets.target import Target


def insert(model: nn.Module, plan: Plan, target: Target) -> nn.Module:
    """Insert the plan's quantizers, with ranges not yet set, into a captured model, which is changed and returned.

    Args:
        model: a captured model.
        plan: the quantizers to insert.
        target: the runtime that the plan was made for.

    Raises:
        PlacementError: the plan was made for another model.
    """
    # Insertion changes the graph, and `Plan.with_rules` must decide about the graph as it was before.
    original = skeleton(model)
    found_in_capture = FoundInCapture(plan.notes, plan.kept)
    plan = dataclasses.replace(plan, decide=lambda options: make_plan(original, options, target, found_in_capture))
    found = named_nodes(model)
    _check_fits(plan, found)
    new = [insert_weight(*found[weight.name], weight, plan.options) for weight in plan.weights]
    for tensor in plan.tensors:
        new.append(insert_tensor([found[name] for name in tensor.places], tensor, plan.options))
    # The graph that runs, and the links from layers to quantizers, need all quantizers in their places.
    settle_regions(model, plan, target)
    for region in regions(model).values():
        # After live BatchNorms are linked to their layers, since their parameters count among a weight's.
        freeze_scales(region, new)
    return model


def settle_regions(model: nn.Module, plan: Plan, target: Target) -> None:
    """Update the parts that depend on a model's quantizers: the code that runs, the layers' links and the plan."""
    for region in regions(model).values():
        region.graph.lint()
        region.execution_graph = fused_graph
        region.after_call = share_ranges
        region.recompile()
        _link_inputs(region, int32_bias=target.int32_bias)
        if plan.options.batchnorm == "fold live":
            fold_live(region)
    record_plan(model, plan)


def record_plan(model: nn.Module, plan: Plan) -> None:
    """Keep a plan with a model, for `plan_of`; the model's regions carry it, so the model may have any class."""
    for region in regions(model).values():
        region.halfeven_plan = plan


@checked_arguments(PlacementError)
def plan_of(model: nn.Module) -> Plan:
    """Return the plan of a model that `prepare` or `load` returned.

    Raises:
        PlacementError: the model has no plan.
    """
    inside = unwrapped(model)
    plan: Plan | None = next((region.halfeven_plan for region in regions(inside).values()), None)
    if plan is None:
        raise PlacementError(
            f"This {type(inside).__name__} has no plan, so it is not a quantized model. Make a quantized model with "
            "halfeven.prepare(model, example)."
        )
    return plan


def is_quantized(model: nn.Module) -> bool:
    """Return True for a model that `prepare` or `load` returned."""
    return any(region.halfeven_plan is not None for region in regions(unwrapped(model)).values())


def recorded_inputs(model: nn.Module) -> Inputs:
    """Return the description of a quantized model's inputs: arguments with a `ModelInput` for each tensor.

    Raises:
        PlacementError: the model is not a quantized model.
    """
    plan_of(model)
    found: Inputs = next(region.halfeven_inputs for region in regions(model).values())
    return found


def recorded_example(model: nn.Module) -> Inputs | None:
    """Return the (positional, keyword) arguments that capture kept, on the CPU; None if there are none."""
    return next((region.halfeven_example for region in regions(unwrapped(model)).values()), None)


def recorded_entries(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the entries of the example, where labels stood between the inputs; else ()."""
    return next((region.halfeven_entries for region in regions(unwrapped(model)).values()), ())


def _check_fits(plan: Plan, found: Mapping[str, tuple[CapturedModule, fx.Node]]) -> None:
    """Raise PlacementError for a plan with tensors or layers that the model does not have."""
    names = [weight.name for weight in plan.weights] + [name for tensor in plan.tensors for name in tensor.places]
    missing = [name for name in names if name not in found]
    if missing:
        raise PlacementError(
            f"The plan was made for another model: this model has no {', '.join(missing[:5])}"
            f"{' and more' if len(missing) > 5 else ''}, so quantizers of the plan cannot be inserted. Use the model, "
            "and the versions of torch and timm, that the plan was made with."
        )


def check_scales(model: nn.Module, plan: Plan) -> None:
    """Raise PlacementError for a plan that gives a weight another number of scales than a captured model's has."""
    found = named_nodes(model)
    for weight in plan.weights:
        if weight.name not in found:
            continue
        node = found[weight.name][1]
        shape = weight_shape(node) if kind_of(node) in WEIGHTED else ()
        channels = shape[weight.scheme.axis] if shape and weight.scheme.axis is not None else weight.channels
        if not shape or channels != weight.channels:
            raise PlacementError(
                f"The plan was made for another model: it gives the weight of {weight.name} {weight.channels} scales, "
                f"and this model's weight has the shape {list(shape)}. Make the plan with this model."
            )


def quantizer_class(planned: PlannedWeight | PlannedTensor) -> type[Quantizer]:
    """Return the class that quantizes a planned weight or activation: the user's, where its code is at hand."""
    own = planned.quantizer
    return Quantizer if own is None or own.implementation is None else own.implementation


def weight_quantizer(planned: PlannedWeight, options: QuantizationOptions) -> Quantizer:
    """Return the quantizer of a planned weight, without a range."""
    quantizer = quantizer_class(planned)(
        planned.scheme,
        channels=planned.channels,
        observer=planned.observer,
        ranges=planned.ranges,
        domain=options.scale_domain,
        scales_gradient=options.gradient_scale == "lsq",
        weight=True,
    )
    quantizer.name = planned.quantizer_name
    quantizer.own_class = planned.quantizer
    return quantizer


def tensor_quantizer(planned: PlannedTensor, options: QuantizationOptions) -> Quantizer:
    """Return the quantizer of a planned activation, without a range unless the plan knows it."""
    quantizer = quantizer_class(planned)(
        planned.scheme,
        observer=planned.observer,
        ranges=planned.ranges,
        domain=options.scale_domain,
        scales_gradient=options.gradient_scale == "lsq",
        learns_zero_point=options.learn_zero_points,
    )
    quantizer.name = planned.quantizer_name
    quantizer.own_class = planned.quantizer
    quantizer.is_recomputation = in_backward_pass
    quantizer.fix_range(planned.fixed_range)
    return quantizer


def insert_weight(
    region: CapturedModule, node: fx.Node, planned: PlannedWeight, options: QuantizationOptions
) -> Quantizer:
    """Make a layer read its weight through a new quantizer, and return the quantizer."""
    quantizer = weight_quantizer(planned, options)
    if not Op(node).is_module:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        # A functional call takes its weight from the graph, so a call of the quantizer goes between the two.
        path = place_quantizer(region, quantizer, f"{planned.name}_weight")
        with region.graph.inserting_after(weight):
            quantized = region.graph.call_module(path, (weight,))
        quantized.meta = dict(weight.meta)
        node.update_arg(1, quantized)
        return quantizer
    layer = Op(node).module
    # The class is changed in place, so parameters, hooks and references to the layer stay valid.
    layer.__class__ = QUANTIZED_LAYERS[type(layer)]
    layer.weight_quantizer = quantizer.to(layer.weight.device).train(region.training)
    return quantizer


def insert_tensor(
    places: Sequence[tuple[CapturedModule, fx.Node]], planned: PlannedTensor, options: QuantizationOptions
) -> Quantizer:
    """Make all readers of tensors with a shared scale read them through a new quantizer, and return the quantizer."""
    quantizer = tensor_quantizer(planned, options)
    region = places[0][0]
    path = place_quantizer(region, quantizer, planned.name)
    for _, node in places:
        after = node
        while Op(after.next).is_input:  # calls come after all inputs of a graph
            after = after.next
        with region.graph.inserting_after(after):
            quantized = region.graph.call_module(path, (node,))
        quantized.meta = dict(node.meta)
        node.replace_all_uses_with(quantized, delete_user_cb=partial(_reads_integers, quantized))
    return quantizer


def _reads_integers(quantized: fx.Node, reader: fx.Node) -> bool:
    """Return True for a reader that must read a tensor in its quantized form."""
    return reader is not quantized and not isinstance(Op(reader).module, ChannelAffine)


def quantizer_path(name: str) -> str:
    """Return the path of a quantizer in its region, from the name that the plan gives it.

    The tensor of a conversion is named "to", as a method of every module is.
    """
    own = name.replace(".", "_").replace(":", "_")
    return f"quantizers.{own}_" if hasattr(nn.Module, own) else f"quantizers.{own}"


def place_quantizer(region: CapturedModule, quantizer: Quantizer, name: str) -> str:
    """Put a quantizer into a region, on its device and in its training mode, and return the path."""
    tensor = next((p for p in region.parameters()), None)
    if tensor is not None:
        quantizer.to(tensor.device)
    path = quantizer_path(name)
    place(region, path, quantizer.train(region.training))
    return path


def _link_inputs(region: CapturedModule, *, int32_bias: bool) -> None:
    """Give each quantized layer the quantizer of its input, whose scale turns the input back into integers."""
    for op in module_calls(region.graph):
        layer = op.module
        if not isinstance(layer, QuantizedLayer):
            continue
        source = quantizer_of(op.inputs[0].node)
        layer.input_quantizers = () if source is None else (source,)
        layer.int32_bias = int32_bias


def quantizer_of(node: fx.Node) -> Quantizer | None:
    """Return the quantizer on whose grid a node's values lie; None if they lie on no grid."""
    op = Op(node)
    # The operands of a concatenation share a quantizer, so the first stands for all.
    while op.kind in (*TRANSPARENT, OperatorKind.CONCAT):
        op = op.inputs[0]
    return op.module if isinstance(op.module, Quantizer) else None
