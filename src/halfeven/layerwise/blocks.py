"""Units of reconstruction: the layers or blocks of a graph, one after the other.

A unit is a run of consecutive nodes. Units follow each other in the order of execution and cover the graph, so that
what one needs has been computed by those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal

from torch import Tensor, fx

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, kind_of, module_of

Granularity = Literal["layers", "blocks"]

LONGEST_BLOCK = 12
"""Layers of a block that is still reconstructed as one; a longer one is taken layer by layer."""
LONGEST_CHAIN = 6
"""Layers of a module whose chain of layers, without a residual, is taken as one block."""
VALUELESS = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class Unit:
    """Consecutive nodes that are reconstructed together."""

    name: str
    """Of its layer, or what the paths of its layers share."""
    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    """The nodes among them that call a layer with a quantized weight."""
    inputs: tuple[fx.Node, ...]
    """Nodes before it whose values it reads."""
    outputs: tuple[fx.Node, ...]
    """Its nodes whose values are read after it."""


def units(region: CapturedModule, granularity: Granularity) -> list[Unit]:
    """Cut a graph into units; each has at least one quantized layer, unless the graph has none.

    "layers": a unit per quantized layer, with what follows it up to the next one. "blocks": the graph is cut wherever a
    single tensor carries all that the layers computed so far, which gives residual and attention blocks; chains of
    layers that belong to one small module of the float model stay together (BRECQ, arXiv 2102.05426, section 3.2).
    """
    nodes = [node for node in region.graph.nodes if node.op not in VALUELESS]
    layers = [index for index, node in enumerate(nodes) if is_quantized_layer(node)]
    starts = [0, *layers[1:]] if granularity == "layers" else _block_starts(nodes, layers)
    return [_unit(nodes[a:b]) for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]


def is_quantized_layer(node: fx.Node) -> bool:
    """Whether a node calls a layer whose weight is quantized."""
    return node.op == "call_module" and kind_of(node) in WEIGHTED and hasattr(module_of(node), "weight_quantizer")


def _unit(nodes: Sequence[fx.Node]) -> Unit:
    inside = set(nodes)
    layers = [node for node in nodes if is_quantized_layer(node)]
    read = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside and i.op != "get_attr")
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return Unit(_name(layers), tuple(nodes), tuple(layers), tuple(read), tuple(outputs))


def _name(layers: Sequence[fx.Node]) -> str:
    shared = _shared_path(layers)
    return shared or f"{layers[0].target} to {layers[-1].target}" if layers else "(no layer)"


def _shared_path(layers: Sequence[fx.Node]) -> str:
    """The module of the float model that holds all the layers; "" for the model itself."""
    steps = zip(*(str(layer.target).split(".") for layer in layers), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, steps))


# Blocks


def _block_starts(nodes: Sequence[fx.Node], layers: Sequence[int]) -> list[int]:
    cuts = _cuts(nodes)
    starts = [0]
    for before, layer in pairwise(layers):
        # The last one: activation and quantizer of a layer stay with it, its successor's normalization does not.
        if between := [cut for cut in cuts if before < cut <= layer]:
            starts.append(between[-1])
    starts = _joined_chains(nodes, starts)
    result: list[int] = []
    for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True):
        inside = [layer for layer in layers if a <= layer < b]
        result += [a, *inside[1:]] if len(inside) > LONGEST_BLOCK else [a]
    return result


def _cuts(nodes: Sequence[fx.Node]) -> list[int]:
    """Indices before which at most one tensor that a layer had a part in is still to be read."""
    index_of = {node: index for index, node in enumerate(nodes)}
    computed = _behind_layers(nodes)
    last_read = {n: max((index_of.get(user, len(nodes)) for user in n.users), default=-1) for n in computed}
    cuts, live = [], {node for node in computed if node.op == "placeholder"}
    for index, node in enumerate(nodes):
        live = {one for one in live if last_read[one] >= index}
        if len(live) <= 1:
            cuts.append(index)
        if node in computed and isinstance(node.meta.get("val"), Tensor | tuple | list):
            live.add(node)
    return cuts


def _behind_layers(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose values depend on a quantized layer, or that are added to one: masks and position tables are not."""
    found: set[fx.Node] = set()
    for node in nodes:
        if is_quantized_layer(node) or any(i in found for i in node.all_input_nodes):
            found.add(node)
            shape = _shape(node)
            found.update(i for i in node.all_input_nodes if _joins_branches(node) and _shape(i) == shape)
    return found


def _shape(node: fx.Node) -> object:
    return getattr(node.meta.get("val"), "shape", None)


def _joined_chains(nodes: Sequence[fx.Node], starts: Sequence[int]) -> list[int]:
    """The starts without those inside a chain: neighbours without a residual, of one small module."""
    all_layers = [node for node in nodes if is_quantized_layer(node)]
    bounds = [*starts[1:], len(nodes)]
    result: list[int] = []
    for start, end in zip(starts, bounds, strict=True):
        if not result or not _one_chain(nodes[result[-1] : end], all_layers):
            result.append(start)
    return result


def _one_chain(nodes: Sequence[fx.Node], all_layers: Sequence[fx.Node]) -> bool:
    if any(_joins_branches(node) for node in nodes):
        return False
    shared = _shared_path([node for node in nodes if is_quantized_layer(node)])
    within = [layer for layer in all_layers if str(layer.target).startswith(f"{shared}.")]
    return bool(shared) and len(within) <= LONGEST_CHAIN


def _joins_branches(node: fx.Node) -> bool:
    tensors = [i for i in node.all_input_nodes if Op(i).is_float_tensor and kind_of(i) is not OperatorKind.CONSTANT]
    return kind_of(node) is OperatorKind.ADD and len(tensors) > 1
