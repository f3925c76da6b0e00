"""Operators on constants alone, computed once: weights that are made of others, resized position embeddings."""

from typing import Any

import torch
from torch import Tensor, fx

from halfeven.graph.restoration import CapturedModule, place


@torch.no_grad()
def fold_constants(region: CapturedModule) -> None:
    """Replace what a graph computes of its parameters, buffers and numbers alone by the result, in place.

    Random operators, modules, and whatever reads a size of the input, stay.
    """
    values: dict[fx.Node, Any] = {}
    for node in region.graph.nodes:
        if node.op == "get_attr":
            values[node] = attribute(region, node)
        elif _is_constant(node, values):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for count, node in enumerate(list(region.graph.nodes)):
        computed = node.op == "call_function" and isinstance(values.get(node), Tensor)
        if not computed or all(user in values for user in node.users):
            continue
        name = f"constants.{node.name}_{count}"
        _keep(region, name, values[node])
        with region.graph.inserting_before(node):
            constant = region.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    for node in reversed(list(region.graph.nodes)):
        if node in values and not node.users:
            region.graph.erase_node(node)


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        if random or node.target._schema.is_mutable:
            return False
    return all(operand in values for operand in node.all_input_nodes)


def attribute(region: CapturedModule, node: fx.Node) -> Any:
    """What a `get_attr` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(region.get_submodule(owner), name)


def _keep(region: CapturedModule, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    if owner not in dict(region.named_modules()):
        place(region, owner, torch.nn.Module())
    region.get_submodule(owner).register_buffer(name, value.detach().clone())
