"""Blocks: consecutive parts of a graph, each of one quantized layer or of a few that belong together.

A block is a run of consecutive nodes. Blocks follow each other in the order of execution and cover the graph, so that
all inputs of a block have been computed by the blocks before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal

from torch import Tensor, fx

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, operations
from halfeven.quantization.model_quantizers import has_quantized_weight

Granularity = Literal["layers", "blocks"]

MAX_BLOCK_LAYERS = 12
"""Largest number of layers in a block; a longer block is cut into its layers."""
MAX_CHAIN_LAYERS = 6
"""Largest number of layers of a module whose chain of layers, without a residual, forms one block."""


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of a graph."""

    name: str
    """Path of its layer, or the common part of its layers' paths."""
    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    """Nodes of the block that call a layer with a quantized weight."""
    inputs: tuple[fx.Node, ...]
    """Nodes before the block that it reads."""
    outputs: tuple[fx.Node, ...]
    """Nodes of the block that are read after it."""


def find_blocks(region: CapturedModule, granularity: Granularity) -> list[Block]:
    """Cut a graph into blocks; each has at least one quantized layer, unless the graph has none.

    Args:
        region: a captured graph with quantizers.
        granularity: "layers" makes a block of each quantized layer and the operators up to the next layer. "blocks"
            cuts the graph wherever a single tensor carries the results of all layers so far, which gives residual and
            attention blocks; chains of layers that belong to one small module of the float model stay together
            (BRECQ, arXiv:2102.05426, section 3.2).
    """
    nodes = computed_nodes(region)
    layers = [index for index, node in enumerate(nodes) if is_quantized_layer(node)]
    # What comes before the first layer belongs to it, and what follows a layer (activation, quantizer, addition)
    # belongs to that layer.
    starts = [0, *layers[1:]] if granularity == "layers" else _block_starts(nodes, layers)
    return [_make_block(nodes[a:b]) for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]


def computed_nodes(region: CapturedModule) -> list[fx.Node]:
    """Return the nodes that blocks consist of: all except inputs, constants and the output."""
    return [op.node for op in operations(region.graph) if op.is_module or op.is_function]


def is_quantized_layer(node: fx.Node) -> bool:
    """Return True for a node that calls a layer with a quantized weight."""
    op = Op(node)
    return op.is_module and op.kind in WEIGHTED and has_quantized_weight(op.module)


def _make_block(nodes: Sequence[fx.Node]) -> Block:
    inside = set(nodes)
    layers = [node for node in nodes if is_quantized_layer(node)]
    # A dict for its order, which a set does not have.
    read = dict.fromkeys(
        read.node for node in nodes for read in Op(node).inputs if read.node not in inside and not read.is_constant
    )
    outputs = [node for node in nodes if any(reader.node not in inside for reader in Op(node).readers)]
    return Block(_block_name(layers), tuple(nodes), tuple(layers), tuple(read), tuple(outputs))


def _block_name(layers: Sequence[fx.Node]) -> str:
    shared = _shared_path(layers)
    return shared or f"{Op(layers[0]).path} to {Op(layers[-1]).path}" if layers else "(no layer)"


def _shared_path(layers: Sequence[fx.Node]) -> str:
    """Return the path of the float model's module that holds all the layers; "" for the model itself."""
    steps = zip(*(Op(layer).path.split(".") for layer in layers), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, steps))


# Blocks


def _block_starts(nodes: Sequence[fx.Node], layers: Sequence[int]) -> list[int]:
    cuts = _possible_cuts(nodes)
    starts = [0]
    for before, layer in pairwise(layers):
        # The last cut: activation and quantizer of a layer stay with it, its successor's normalization does not.
        if between := [cut for cut in cuts if before < cut <= layer]:
            starts.append(between[-1])
    # Chains without a residual are joined where they belong to one small module; then blocks of very many layers are
    # cut into their layers.
    starts = _joined_chains(nodes, starts)
    result: list[int] = []
    for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True):
        inside = [layer for layer in layers if a <= layer < b]
        result += [a, *inside[1:]] if len(inside) > MAX_BLOCK_LAYERS else [a]
    return result


def _possible_cuts(nodes: Sequence[fx.Node]) -> list[int]:
    """Return the indices before which at most one tensor computed by layers is still to be read."""
    index_of = {node: index for index, node in enumerate(nodes)}
    computed = _behind_layers(nodes)
    # A tensor that the graph's output reads is live to the end: the output is none of `nodes`.
    last_read = {n: max((index_of.get(user, len(nodes)) for user in n.users), default=-1) for n in computed}
    cuts = []
    # An input that is added to a layer's result is live from the start.
    live = {node for node in computed if Op(node).is_input}
    for index, node in enumerate(nodes):
        live = {tensor for tensor in live if last_read[tensor] >= index}
        # A residual block has two live tensors inside, its branch and the skip connection, and one at its end.
        if len(live) <= 1:
            cuts.append(index)
        if node in computed and isinstance(Op(node).value, Tensor | tuple | list):
            live.add(node)
    return cuts


def _behind_layers(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on a quantized layer or are added to such a node, unlike masks and tables."""
    found: set[fx.Node] = set()
    for node in nodes:
        inputs = [read.node for read in Op(node).inputs]
        if is_quantized_layer(node) or any(read in found for read in inputs):
            found.add(node)
            if _joins_branches(node):
                # A skip connection that starts before the first layer, at an embedding for example, is live beside its
                # branch. Masks and tables have other shapes: they broadcast.
                found.update(read for read in inputs if _recorded_shape(read) == _recorded_shape(node))
    return found


def _recorded_shape(node: fx.Node) -> object:
    return getattr(Op(node).value, "shape", None)


def _joined_chains(nodes: Sequence[fx.Node], starts: Sequence[int]) -> list[int]:
    """Return the starts except those inside a chain: blocks without a residual that belong to one small module."""
    all_layers = [node for node in nodes if is_quantized_layer(node)]
    bounds = [*starts[1:], len(nodes)]
    result: list[int] = []
    for start, end in zip(starts, bounds, strict=True):
        if not result or not _is_one_chain(nodes[result[-1] : end], all_layers):
            result.append(start)
    return result


def _is_one_chain(nodes: Sequence[fx.Node], all_layers: Sequence[fx.Node]) -> bool:
    if any(_joins_branches(node) for node in nodes):
        return False
    # The smallest module around the chain decides: if it has many layers, it is a stage or the whole network, and no
    # unit.
    shared = _shared_path([node for node in nodes if is_quantized_layer(node)])
    within = [layer for layer in all_layers if Op(layer).path.startswith(f"{shared}.")]
    return bool(shared) and len(within) <= MAX_CHAIN_LAYERS


def _joins_branches(node: fx.Node) -> bool:
    op = Op(node)
    tensors = [read for read in op.inputs if read.is_float_tensor and not read.is_constant]
    return op.kind is OperatorKind.ADD and len(tensors) > 1
