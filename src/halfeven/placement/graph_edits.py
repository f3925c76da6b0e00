"""Change the graph for an algorithm, and record the change in the plan so that loading a checkpoint repeats it."""

import dataclasses
from typing import Any

import torch
from torch import fx, nn

from halfeven.errors import PlacementError
from halfeven.graph.operators import WEIGHTED
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, keep_tensor_name, kind_of, module_of, replace_call
from halfeven.placement.channel_affine import insert_rescaling
from halfeven.placement.channel_clip import insert_channel_clip
from halfeven.placement.insertion import plan_of, record_plan
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.plan import GraphChanges
from halfeven.placement.tied_weights import tied_parameters, untie

aten = torch.ops.aten


def apply_changes(model: nn.Module, changes: GraphChanges) -> nn.Module:
    """Make the changes in a captured or quantized model, in place; changes that were made before have no effect.

    Raises:
        PlacementError: the model has no operator or layer of a name, or the change does not apply to it.
    """
    found = named_nodes(model)
    # Copies come first: the changes after them are of the parameters of single layers.
    untie(model, changes.untied)
    for name in changes.unclipped:
        _replace_by_relu(name, _node_named(found, name)[1])
    for name in changes.clipped_by_channel:
        insert_channel_clip(*_node_named(found, name), name)
    for name in changes.given_biases:
        _give_bias(name, _node_named(found, name)[1])
    for name in changes.rescaled:
        insert_rescaling(*_node_named(found, name), name)
    for region in {region for region, _ in found.values()}:
        region.recompile()
    return model


def record_changes(
    qmodel: nn.Module,
    *,
    unclipped: tuple[str, ...] = (),
    clipped_by_channel: tuple[str, ...] = (),
    given_biases: tuple[str, ...] = (),
    rescaled: tuple[str, ...] = (),
    untied: tuple[str, ...] = (),
) -> GraphChanges:
    """Make changes in a quantized model, in place, and record them in its plan.

    Returns:
        All changes that the plan records, earlier ones included.
    """
    plan = plan_of(qmodel)
    made = GraphChanges(
        unclipped=unclipped,
        clipped_by_channel=clipped_by_channel,
        given_biases=given_biases,
        rescaled=rescaled,
        untied=untied,
    )
    # First the change, which is refused where it does not apply: then the plan stays as it was.
    apply_changes(qmodel, made)
    changes = plan.changes.joined(made)
    record_plan(qmodel, dataclasses.replace(plan, changes=changes))
    return changes


def untie_layers(qmodel: nn.Module, parameters: tuple[str, ...] = ("weight", "bias")) -> None:
    """Give each layer of a quantized model parameters of its own, in place, before an algorithm changes them.

    Parameters that a single operator reads stay as they are. The plan records the parameters that are copied.

    Args:
        qmodel: a model from `prepare`.
        parameters: names of the parameters that the algorithm changes.
    """
    tied = tuple(name for name in tied_parameters(qmodel) if name.rpartition(".")[2] in parameters)
    if tied:
        record_changes(qmodel, untied=tied)


def give_bias(qmodel: nn.Module, name: str) -> nn.Parameter:
    """Return the bias of a layer of a quantized model, [output channels].

    A layer without a bias gets a bias of zeros, which the plan records.

    Args:
        qmodel: a model from `prepare`.
        name: the layer, as the plan names it.

    Raises:
        PlacementError: the model has no such layer.
    """
    layer: Any = _layer_named(name, _node_named(named_nodes(qmodel), name)[1])
    if layer.bias is None:
        record_changes(qmodel, given_biases=(name,))
    bias: nn.Parameter = layer.bias
    return bias


def _node_named(nodes: dict[str, tuple[CapturedModule, fx.Node]], name: str) -> tuple[CapturedModule, fx.Node]:
    if name not in nodes:
        raise PlacementError(
            f"The model has no tensor named {name}, so nothing can be changed there. Choose a name that the plan "
            "lists: print(halfeven.plan_of(qmodel))."
        )
    return nodes[name]


def _replace_by_relu(name: str, node: fx.Node) -> None:
    """Replace a ReLU with an upper bound by a ReLU, in place."""
    bounds = Op(node).bounds
    if bounds is None or bounds[0] != 0:
        raise PlacementError(
            f"{name} is a {Op(node).name}, not a ReLU with an upper bound, so it cannot become a ReLU. Name ReLU6 "
            "operators and clamps from 0 only."
        )
    # The change was made before.
    if bounds[1] == float("inf"):
        return
    # A checkpoint names this tensor as it was called before the change.
    keep_tensor_name(node, name.rpartition(":")[2])
    replace_call(node, aten.relu.default, node.all_input_nodes[:1])


def _give_bias(name: str, node: fx.Node) -> None:
    layer: Any = _layer_named(name, node)
    if layer.bias is None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        zeros = torch.zeros(channels, dtype=layer.weight.dtype, device=layer.weight.device)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)


def _layer_named(name: str, node: fx.Node) -> nn.Module:
    if not Op(node).is_module or kind_of(node) not in WEIGHTED:
        raise PlacementError(
            f"{name} is a {Op(node).name}, not a convolution or linear module, so it has no bias to set. Name a "
            "layer of the plan's table of weights that is a module."
        )
    return module_of(node)
