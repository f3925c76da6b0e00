"""The calls of layers that a runtime executed: it merges equal calls, and leaves out those that nothing reads."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from halfeven.deployment.layer_calls import named_calls
from halfeven.deployment.quantize_op import ExportedQuantizer, grid_values
from halfeven.graph.data_flow import is_read_for_its_size
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import hashable
from halfeven.graph.torch_private import is_operator, is_pure
from halfeven.graph.view import Op, operations
from halfeven.runtimes.layer_execution import LayerExecution
from halfeven.runtimes.runtime import DeployedFile


def executed_calls(file: DeployedFile, parts: dict[str, CapturedModule]) -> list[LayerExecution]:
    """Return the runtime's account of the calls of layers with quantized weights, in the order of the graphs.

    A call that the runtime does not mention is left out where it ran an equal one, or nothing reads the call's values.

    Args:
        file: the file, opened in its runtime.
        parts: the deployed model's regions by name, their quantizers written as operators.
    """
    calls = named_calls(parts)
    executed = {layer.layer: layer for layer in file.executed_layers(list(calls.values()))}
    same = {node: first for region in parts.values() for node, first in _first_equal_nodes(region.graph).items()}
    ran = {same[node] for node, name in calls.items() if executed[name].is_known}
    return [
        executed[name]
        for node, name in calls.items()
        if executed[name].is_known or not (same[node] in ran or is_read_for_its_size(node))
    ]


def _first_equal_nodes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return for each node the first one that computes the same, by the same operators on the same inputs."""
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for op in operations(graph):
        try:
            same[op.node] = first.setdefault(_computation(op, same), op.node)
        except TypeError:  # an argument that cannot be hashed
            same[op.node] = op.node
    return same


def _computation(op: Op, same: Mapping[fx.Node, fx.Node]) -> Any:
    node = op.node
    given = hashable(fx.map_arg(node.args, same.__getitem__)), hashable(fx.map_arg(node.kwargs, same.__getitem__))
    if op.is_constant:
        return node.op, node.target
    if op.is_module and isinstance(op.module, ExportedQuantizer):
        return grid_values(op.module), given
    if op.is_module and op.kind is not OperatorKind.FLOAT:
        return op.module, given
    if node.target is operator.getitem or (is_operator(node.target) and is_pure(node.target)):
        return node.target, given
    return node
