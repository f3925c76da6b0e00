"""Pairs of layers in which the first layer's output reaches the second layer alone, channel by channel.

Equalization and bias absorption move factors and offsets of single channels from the first layer to the second. Between
the two may be only operators that treat each channel by itself and commute with a positive factor; a branch, an
addition or a concatenation ends the search.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph.layer_shapes import channel_axis
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.view import Op, module_calls, operations, tensor_names
from halfeven.placement.channel_clip import ChannelClip, channel_clip_at
from halfeven.placement.make_plan import qualified, regions
from halfeven.quantization.quantizer import Quantizer

# Weights by channel


def weight_by_channel(layer: Any, inputs: int | None = None, *, weight: Tensor | None = None) -> Tensor:
    """Return a layer's weight as [groups, outputs of a group, inputs of a group, *window]: a view that can be written.

    Args:
        layer: a convolution, transposed convolution or linear module.
        inputs: number of channels that a linear layer reads, where each was flattened to several features: the window
            is then the features of a channel. None: one feature each.
        weight: a tensor of the layout of the layer's weight, to take in its place.
    """
    weight = layer.weight if weight is None else weight
    if isinstance(layer, nn.Linear):
        return _split_axis(weight, 1, inputs or layer.in_features)[None]  # [1, outputs, inputs, features]
    # A convolution's weight is [outputs, inputs / groups, ...] and a transposed convolution's is [inputs, outputs /
    # groups, ...]: axis 0 has the groups in both.
    grouped = _split_axis(weight, 0, layer.groups)
    return grouped.transpose(1, 2) if layer.transposed else grouped


def _split_axis(weight: Tensor, axis: int, parts: int) -> Tensor:
    """Return a view with an axis split into [parts, rest]."""
    shape = tuple(weight.shape)
    return weight.view(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])


def output_ranges(weight: Tensor) -> Tensor:
    """Return the largest |weight| of each output channel, [outputs], of a weight by channel."""
    # Groups are runs of consecutive channels, so that [groups, outputs of a group], flattened, are the channels in
    # order.
    return weight.abs().amax(dim=(2, *range(3, weight.ndim))).flatten()


def input_ranges(weight: Tensor) -> Tensor:
    """Return the largest |weight| that reads each input channel, [inputs], of a weight by channel."""
    return weight.abs().amax(dim=(1, *range(3, weight.ndim))).flatten()


def apply_to_constant(weight: Tensor, values: Tensor) -> Tensor:
    """Return the outputs, [outputs], of a weight by channel for inputs that are constant in space, [inputs].

    Borders with padding are left aside.
    """
    # An input that is constant in space meets every tap of the window with the same value.
    summed = weight.flatten(3).sum(3) if weight.ndim > 3 else weight
    return (summed * values.reshape(len(weight), 1, -1)).sum(2).flatten()


def is_depthwise(layer: Any) -> bool:
    """Return True for a layer that computes each output channel from one input channel of its own."""
    return not isinstance(layer, nn.Linear) and bool(layer.groups == layer.in_channels == layer.out_channels)


# Layers that may be rewritten


def rewritable_layers(model: nn.Module) -> tuple[dict[str, fx.Node], tuple[str, ...]]:
    """Return the layers whose weights an algorithm may rewrite, by name, and the names of the rest with reasons.

    A weight that is read in a second place cannot be changed for one of its readers alone.
    """
    # By identity: a tied weight is one parameter under several names.
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, fx.Node] = {}
    left: list[str] = []
    for prefix, region in regions(model).items():
        calls = Counter(op.path for op in module_calls(region.graph))
        # A parameter may also be a tensor of the graph, read by an operator beside its layer.
        constants = {id(op.constant) for op in operations(region.graph) if op.is_constant}
        for name, node in tensor_names(region.graph).items():
            op = Op(node)
            if op.kind not in WEIGHTED:
                continue
            reason = _why_not_rewritable(op, calls, owners, constants)
            if reason is None:
                found[qualified(prefix, name)] = node
            else:
                left.append(f"{qualified(prefix, name)} ({reason})")
    return found, tuple(left)


def _why_not_rewritable(op: Op, calls: Counter[str], owners: Counter[int], constants: set[int]) -> str | None:
    """Return why the weight of a layer must stay as it is; None if it may be rewritten."""
    layer: Any = op.module
    if layer is None:
        return "called as a function"
    if calls[op.path] > 1:
        return "called more than once"
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None and (owners[id(parameter)] > 1 or id(parameter) in constants):
            return f"its {name} is tied to another's"
    return None


# Pairs


@dataclass(frozen=True)
class LayerPair:
    """Two layers and the operators between them; the second alone reads the first's output."""

    producer: fx.Node
    consumer: fx.Node
    between: tuple[fx.Node, ...]
    """Operators from the first layer to the second, in order."""

    @property
    def clips(self) -> tuple[fx.Node, ...]:
        """The operators between that do not commute with a factor unless their bounds are divided by it."""
        return tuple(node for node in self.between if _is_other_clip(node))


def find_layer_pairs(layers: Mapping[str, fx.Node], *, through_clips: bool = False) -> list[LayerPair]:
    """Return all pairs among layers of `rewritable_layers`, in the order of the graph.

    Args:
        layers: layers by name.
        through_clips: pass ReLU6 and other clips to constant bounds too, which commute with a factor only if their
            bounds are divided by it.
    """
    nodes = set(layers.values())
    found = [_pair_from(node, nodes, through_clips) for node in layers.values()]
    return [pair for pair in found if pair is not None]


def _pair_from(producer: fx.Node, layers: set[fx.Node], through_clips: bool) -> LayerPair | None:
    """Return the pair that starts with a layer; None if no layer alone reads its output channel by channel."""
    # Invariant: `node` carries the producer's channels on `axis`, and all operators so far are in `between`.
    node = producer
    axis = channel_axis(producer, producer)
    between: list[fx.Node] = []
    while (reader := Op(node).only_reader) is not None:
        if reader.node in layers:
            fits = axis == channel_axis(reader.node, node)
            return LayerPair(producer, reader.node, tuple(between)) if fits else None
        after = _axis_after(reader, node, axis, through_clips)
        if after is None:
            return None
        node = reader.node
        axis = after
        between.append(node)
    return None


def _axis_after(reader: Op, node: fx.Node, axis: int, through_clips: bool) -> int | None:
    """Return the axis of the channels after an operator; None where the channels' factors do not pass it."""
    # The tensor is another argument, such as the second operand of a product or a convolution's weight.
    if not reader.node.args or reader.node.args[0] is not node:
        return None
    if reader.kind is OperatorKind.IDENTITY:
        return axis
    if reader.is_module:
        module = reader.module
        if isinstance(module, ChannelClip):
            return axis if through_clips else None
        return axis if isinstance(module, Quantizer) and module.scheme.axis is None else None
    if reader.bounds is not None:
        # Only ReLU commutes with every positive factor. A ReLU6 would clip at 6 / s, at another value for each channel.
        return axis if through_clips or not _is_other_clip(reader.node) else None
    return reader.factor_axis(axis)


def _is_other_clip(node: fx.Node) -> bool:
    """Return True for a clip to constant bounds other than ReLU's, or to bounds by channel."""
    return Op(node).bounds not in (None, (0.0, math.inf)) or channel_clip_at(node) is not None
