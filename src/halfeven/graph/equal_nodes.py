"""Find the nodes of two exported graphs that compute the same of the same."""

from collections.abc import Container
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph.torch_private import is_operator, parameters_of

MODE_FLAGS = ("train", "training")
"""Arguments of operators, such as dropout, that say which mode the model was in while it was traced."""


def number_nodes(module: fx.GraphModule, numbers: dict[Any, int], own: Container[str]) -> dict[fx.Node, int]:
    """Return a number for each node of a graph; nodes that compute the same of the same have equal numbers.

    Args:
        module: an exported model.
        numbers: the numbers given so far, of this graph or others; it grows.
        own: names of the parameters and buffers that the graphs share.
    """
    found: dict[fx.Node, int] = {}

    def key(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "node", found[value]
        if isinstance(value, list | tuple):
            return tuple(key(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, key(item)) for name, item in value.items())
        return repr(value)

    for node in module.graph.nodes:
        target = constant_key(module, node.target, own) if node.op == "get_attr" else node.target
        # Operands come before their readers in a graph, so that equal computations get equal numbers from the inputs
        # on.
        whole = (node.op, target, key(_without_mode(node)), key(_in_any_mode(node.kwargs)))
        found[node] = numbers.setdefault(whole, len(numbers))
    return found


def constant_key(module: fx.GraphModule, path: Any, own: Container[str]) -> Any:
    """Return the path of a parameter or buffer, and the value of a constant that was lifted out of the code."""
    if path in own:
        return path
    value = attribute_at(module, path)  # under a name that differs between the graphs
    return repr((value.dtype, value.tolist())) if isinstance(value, Tensor) else path


def attribute_at(module: nn.Module, path: str) -> Any:
    """Return the tensor or module at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _without_mode(node: fx.Node) -> list[Any]:
    if not is_operator(node.target):
        return list(node.args)
    names = [parameter.name for parameter in parameters_of(node.target)]
    return [value for name, value in zip(names, node.args, strict=False) if name not in MODE_FLAGS]


def _in_any_mode(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in MODE_FLAGS}
