"""Inserting a plan's quantizers into a captured model. Each is inserted once; none is inserted to be deleted."""

import operator
from functools import partial
from typing import Any

from torch import fx, nn

from halfeven.errors import PlacementError
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule, place
from halfeven.graph.view import kind_of, module_of
from halfeven.placement.execution_graph import fused_graph
from halfeven.placement.folded_batchnorm import fold_live
from halfeven.placement.make_plan import named_nodes, regions
from halfeven.placement.options import QuantizationOptions
from halfeven.placement.plan import Plan, PlannedTensor, PlannedWeight
from halfeven.placement.quantized_layers import QUANTIZED_LAYERS, QuantizedLayer
from halfeven.quantization.fake_quantize import Domain
from halfeven.quantization.quantizer import Quantizer
from halfeven.targets.target import Target


def insert(model: nn.Module, plan: Plan, target: Target) -> nn.Module:
    """Put the plan's quantizers, their ranges not yet set, into a captured model; it is changed and returned.

    Args:
        model: a captured model.
        plan: the quantizers to insert.
        target: the runtime that the plan was made for.

    Raises:
        PlacementError: the plan names a tensor that the model does not have.
    """
    found = named_nodes(model)
    missing = [name for name in _names(plan) if name not in found]
    if missing:
        raise PlacementError(
            f"The plan was made for another model: this one has no {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}. Use the model (and the versions of torch and timm) it was "
            f"made with."
        )
    for weight in plan.weights:
        _insert_weight(*found[weight.name], weight, plan.options.scale_domain)
    for tensor in plan.tensors:
        _insert_tensor([found[name] for name in tensor.places], tensor, plan.options)
    for region in regions(model).values():
        region.graph.lint()
        region.execution_graph = fused_graph
        region.recompile()
        _link_inputs(region, int32_bias=target.int32_bias)
        if plan.options.batchnorm == "fold live":
            fold_live(region)
    record_plan(model, plan)
    return model


def record_plan(model: nn.Module, plan: Plan) -> None:
    """Let `plan_of` return this plan; the model's regions carry it, whatever class the model itself has."""
    for region in regions(model).values():
        region.halfeven_plan = plan


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model that `prepare` or `load` returned.

    Raises:
        PlacementError: the model has no plan.
    """
    plan: Plan | None = next((region.halfeven_plan for region in regions(model).values()), None)
    if plan is None:
        raise PlacementError(
            f"This {type(model).__name__} has no plan: it is not a quantized model. Make one with "
            "halfeven.prepare(model, example)."
        )
    return plan


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def record_example(model: nn.Module, inputs: Inputs) -> None:
    """Keep (positional, keyword) arguments of two samples with a quantized model, on the CPU: exporting traces it."""
    for region in regions(model).values():
        region.halfeven_example = inputs


def recorded_example(model: nn.Module) -> Inputs | None:
    """Return the (positional, keyword) arguments that `record_example` kept, None without any."""
    return next((region.halfeven_example for region in regions(model).values()), None)


def _names(plan: Plan) -> list[str]:
    return [weight.name for weight in plan.weights] + [name for tensor in plan.tensors for name in tensor.places]


def _insert_weight(region: CapturedModule, node: fx.Node, planned: PlannedWeight, domain: Domain) -> None:
    quantizer = Quantizer(
        planned.scheme,
        channels=planned.channels,
        observer=planned.observer,
        ranges=planned.ranges,
        domain=domain,
        weight=True,
    )
    quantizer.name = f"the weight of {planned.name}"
    quantizer.train(region.training)
    if node.op == "call_module":
        module: Any = module_of(node)
        # The class is exchanged in place: parameters, hooks and references to the layer stay what they are.
        module.__class__ = QUANTIZED_LAYERS[type(module)]
        module.weight_quantizer = quantizer.to(module.weight.device)
        return
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    path = _place(region, quantizer, f"{planned.name}_weight")
    with region.graph.inserting_after(weight):
        quantized = region.graph.call_module(path, (weight,))
    quantized.meta = dict(weight.meta)
    node.update_arg(1, quantized)


def _insert_tensor(
    places: list[tuple[CapturedModule, fx.Node]], planned: PlannedTensor, options: QuantizationOptions
) -> None:
    quantizer = Quantizer(
        planned.scheme,
        observer=planned.observer,
        ranges=planned.ranges,
        domain=options.scale_domain,
        learns_zero_point=options.learn_zero_points,
    )
    quantizer.name = " = ".join(planned.places)
    quantizer.fix_range(planned.fixed_range)
    region = places[0][0]
    quantizer.train(region.training)
    path = _place(region, quantizer, planned.name)
    for _, node in places:
        after = node
        while after.next.op == "placeholder":
            after = after.next
        with region.graph.inserting_after(after):
            quantized = region.graph.call_module(path, (node,))
        quantized.meta = dict(node.meta)
        node.replace_all_uses_with(quantized, delete_user_cb=partial(operator.is_not, quantized))


def _place(region: CapturedModule, quantizer: Quantizer, name: str) -> str:
    tensor = next((p for p in region.parameters()), None)
    path = f"quantizers.{name.replace('.', '_').replace(':', '_')}"
    place(region, path, quantizer if tensor is None else quantizer.to(tensor.device))
    return path


def _link_inputs(region: CapturedModule, *, int32_bias: bool) -> None:
    """Tell each quantized layer the quantizer of its input, whose scale makes integers of it again (see `layers`)."""
    for node in region.graph.nodes:
        if node.op != "call_module" or not isinstance(layer := module_of(node), QuantizedLayer):
            continue
        source = quantizer_of(node.all_input_nodes[0])
        layer.input_quantizers = () if source is None else (source,)
        layer.int32_bias = int32_bias


def quantizer_of(node: fx.Node) -> Quantizer | None:
    """The quantizer on whose grid a node's values lie, or None."""
    while kind_of(node) in (OperatorKind.SAME_SCALE, OperatorKind.IDENTITY, OperatorKind.CONCAT):
        node = node.all_input_nodes[0]
    if node.op != "call_module" or not isinstance(module := module_of(node), Quantizer):
        return None
    return module
