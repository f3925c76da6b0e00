"""Links: where all that a layer puts out reaches one other layer, channel by channel.

Equalization and bias absorption move factors and offsets of single channels across a link. It may pass only operators
that treat each channel by itself and commute with a positive factor; a branch, an addition or a concatenation ends it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.view import Op, kind_of, module_of, tensor_names
from halfeven.placement.make_plan import qualified, regions
from halfeven.quantization.quantizer import Quantizer

# Weights by channel


def weight_by_channel(layer: Any, inputs: int | None = None, *, weight: Tensor | None = None) -> Tensor:
    """A layer's weight as [groups, outputs of a group, inputs of a group, *window]: a view, so it can be written to.

    Args:
        layer: a convolution, transposed convolution or linear module.
        inputs: channels that a linear layer reads, where they were flattened to several features each: the window is
            then the features of a channel. None: one feature each.
        weight: a tensor that lies as the layer's weight does, to take in its place.
    """
    weight = layer.weight if weight is None else weight
    if isinstance(layer, nn.Linear):
        return _split(weight, 1, inputs or layer.in_features)[None]
    grouped = _split(weight, 0, layer.groups)
    return grouped.transpose(1, 2) if layer.transposed else grouped


def _split(weight: Tensor, axis: int, parts: int) -> Tensor:
    """A view with an axis of so many parts before what is left of the axis."""
    shape = tuple(weight.shape)
    return weight.view(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])


def output_ranges(weight: Tensor) -> Tensor:
    """Largest |weight| of each output channel, [outputs], of a weight by channel."""
    return weight.abs().amax(dim=(2, *range(3, weight.ndim))).flatten()


def input_ranges(weight: Tensor) -> Tensor:
    """Largest |weight| that each input channel meets, [inputs], of a weight by channel."""
    return weight.abs().amax(dim=(1, *range(3, weight.ndim))).flatten()


def apply_to_constant(weight: Tensor, values: Tensor) -> Tensor:
    """What a weight by channel makes of inputs that are constant in space, [inputs] -> [outputs], borders aside."""
    summed = weight.flatten(3).sum(3) if weight.ndim > 3 else weight
    return (summed * values.reshape(len(weight), 1, -1)).sum(2).flatten()


def is_depthwise(layer: Any) -> bool:
    """Whether each output channel of a layer is made of one input channel of its own."""
    return not isinstance(layer, nn.Linear) and bool(layer.groups == layer.in_channels == layer.out_channels)


def output_channels(layer: Any) -> int:
    """Number of a layer's output channels."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


# Which layers may be rewritten


def rewritable_layers(model: nn.Module) -> tuple[dict[str, fx.Node], tuple[str, ...]]:
    """Layers whose weights an algorithm may rewrite, by name; and the others, each with the reason.

    A weight that something else reads too cannot be changed for one reader alone.
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, fx.Node] = {}
    left: list[str] = []
    for prefix, region in regions(model).items():
        calls = Counter(node.target for node in region.graph.nodes if node.op == "call_module")
        read = {_attribute(region, str(node.target)) for node in region.graph.nodes if node.op == "get_attr"}
        for name, node in tensor_names(region.graph).items():
            if kind_of(node) not in WEIGHTED:
                continue
            name, reason = qualified(prefix, name), None
            if node.op != "call_module":
                reason = "called as a function"
            elif calls[node.target] > 1:
                reason = "called more than once"
            elif owners[id(module_of(node).weight)] > 1 or id(module_of(node).weight) in read:
                reason = "its weight is tied to another's"
            if reason is None:
                found[name] = node
            else:
                left.append(f"{name} ({reason})")
    return found, tuple(left)


def _attribute(module: nn.Module, path: str) -> int:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return id(value)


# Which layers are linked


@dataclass(frozen=True)
class Link:
    """Two layers, and the operators on the way from the first to the second, which alone reads it."""

    producer: fx.Node
    consumer: fx.Node
    between: tuple[fx.Node, ...]


def links(layers: Mapping[str, fx.Node], *, through_clips: bool = False) -> list[Link]:
    """All links among layers of `rewritable_layers`, in the order of the graph.

    Args:
        layers: layers by name.
        through_clips: whether to pass ReLU6 and its like, which do not commute with a factor, too.
    """
    nodes = set(layers.values())
    found = [_link_from(node, nodes, through_clips) for node in layers.values()]
    return [link for link in found if link is not None]


def _link_from(producer: fx.Node, layers: set[fx.Node], through_clips: bool) -> Link | None:
    node, axis = producer, channel_axis(producer, producer)
    between: list[fx.Node] = []
    while len(node.users) == 1:
        (reader,) = node.users
        if reader in layers:
            fits = axis == channel_axis(reader, node)
            return Link(producer, reader, tuple(between)) if fits else None
        after = _axis_after(reader, node, axis, through_clips)
        if after is None:
            return None
        node, axis = reader, after
        between.append(reader)
    return None


def channel_axis(layer: fx.Node, tensor: fx.Node) -> int:
    """The axis of a layer's input or output, `tensor`, on which its channels lie."""
    module: Any = module_of(layer)
    ndim = len(_shape(tensor))
    return ndim - 1 if isinstance(module, nn.Linear) else ndim - module.weight.ndim + 1


def _axis_after(reader: fx.Node, node: fx.Node, axis: int, through_clips: bool) -> int | None:
    """The axis of the channels in what an operator makes of a tensor; None where the channels' factors do not pass."""
    if not reader.args or reader.args[0] is not node:
        return None
    if kind_of(reader) is OperatorKind.IDENTITY:
        return axis
    if reader.op == "call_module":
        module = module_of(reader)
        return axis if isinstance(module, Quantizer) and module.scheme.axis is None else None
    if (bounds := Op(reader).bounds) is not None:
        low, high = bounds
        return axis if low == 0 and (high == float("inf") or through_clips) else None
    return Op(reader).factor_axis(axis)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)
