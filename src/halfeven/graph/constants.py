"""Compute operators on constants once: weights made from other weights, resized position embeddings."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import is_operator, is_pure
from halfeven.graph.tree import place
from halfeven.graph.view import Op


@torch.no_grad()
def fold_constants(region: CapturedModule, stays: Callable[[nn.Module], bool]) -> None:
    """Replace results that depend on parameters, buffers and numbers alone by constants, in place.

    Random operators, and operators that read a size of the input, stay. Modules are computed as in eval mode, and are
    removed after their last call.

    Args:
        region: the captured graph.
        stays: returns True for a module that is kept although its inputs are constant.
    """
    values: dict[fx.Node, Any] = {}
    # Forwards: what depends on constants alone is computed, operands before their readers.
    for node in region.graph.nodes:
        if Op(node).is_constant:
            values[node] = Op(node).constant
        elif _is_constant(node, values, stays):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            function: Any = Op(node).module if Op(node).is_module else node.target
            values[node] = function(*args, **kwargs)
    # Where a computed value meets an operator that is not constant, a buffer takes its place. What only led to it is
    # removed below, from the last node to the first.
    for count, node in enumerate(list(region.graph.nodes)):
        computed = not Op(node).is_constant and isinstance(values.get(node), Tensor)
        if not computed or all(user in values for user in node.users):
            continue
        name = f"constants.{node.name}_{count}"
        _register_constant(region, name, values[node])
        with region.graph.inserting_before(node):
            constant = region.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    for node in reversed(list(region.graph.nodes)):
        if node in values and not node.users:
            region.graph.erase_node(node)
    region.delete_all_unused_submodules()


def _is_constant(node: fx.Node, values: dict[fx.Node, Any], stays: Callable[[nn.Module], bool]) -> bool:
    op = Op(node)
    if not (op.is_function or op.is_module) or (op.is_module and stays(op.module)):
        return False
    if is_operator(node.target) and not is_pure(node.target):
        return False
    return all(operand in values for operand in node.all_input_nodes)


def _register_constant(region: CapturedModule, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    if owner not in dict(region.named_modules()):
        place(region, owner, nn.Module())
    region.get_submodule(owner).register_buffer(name, value.detach().clone())
