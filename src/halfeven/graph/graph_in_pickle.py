"""The graph of a captured model as plain values, for pickles: `torch.save(model)`, or processes that get a model.

torch.fx pickles a graph as its source, and traces the source to read it, which fails where an operator takes a size of
its input (`torch.zeros(x.shape[0], 6)`) and loses the keyword arguments. Here each node is kept as it is, but for its
recorded result, which has no data.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from halfeven.graph.torch_private import call_form, is_operator, overload_named, overload_path, with_call_form

KEPT_META = ("halfeven_name", "nn_module_stack")


@dataclass(frozen=True)
class PackedNode:
    """A node of a graph, with the names of nodes in their places."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Operator:
    """An overload of `torch.ops`, by its path."""

    path: tuple[str, str, str]


@dataclass(frozen=True)
class _NodeName:
    name: str


@dataclass(frozen=True)
class PackedGraph:
    """A graph as plain values."""

    nodes: tuple[PackedNode, ...]
    form: Any
    """Its arguments and outputs, as users give and get them; None for a graph of tensors alone."""


def packed(graph: fx.Graph) -> PackedGraph:
    """Return a graph as values that can be pickled."""
    return PackedGraph(tuple(_packed_node(node) for node in graph.nodes), call_form(graph))


def unpacked(values: PackedGraph) -> fx.Graph:
    """Return the graph that `packed` made values of."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def argument(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _NodeName) else value

    for node in values.nodes:
        target = overload_named(*node.target.path) if isinstance(node.target, _Operator) else node.target
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), argument)
        nodes[node.name] = graph.create_node(node.op, target, args, kwargs, name=node.name)
        nodes[node.name].meta = dict(node.meta)
    with_call_form(graph, values.form)
    return graph


def _packed_node(node: fx.Node) -> PackedNode:
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _name_of)
    target = _Operator(overload_path(node.target)) if is_operator(node.target) else node.target
    meta = {name: node.meta[name] for name in KEPT_META if node.meta.get(name) is not None}
    if stack := meta.get("nn_module_stack"):
        # The classes of the modules may be such as cannot be imported; their paths are all that is read.
        meta["nn_module_stack"] = {key: (path, str(kind)) for key, (path, kind) in stack.items()}
    return PackedNode(node.name, node.op, target, _plain(args), _plain(kwargs), meta)


def _name_of(value: Any) -> Any:
    return _NodeName(value.name) if isinstance(value, fx.Node) else value


def _plain(value: Any) -> Any:
    """Return torch.fx's own lists and dicts as Python's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    return value
