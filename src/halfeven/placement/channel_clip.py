"""A clip whose bounds differ by channel: what a ReLU6 becomes when its channels are scaled."""

import torch
from torch import Tensor, fx, nn

from halfeven.errors import PlacementError
from halfeven.graph.layer_shapes import channel_axis
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import Op, keep_tensor_name, kind_of, replace_call
from halfeven.quantization.quantizer import Quantizer


class ChannelClip(nn.Module):
    """Clip each channel to bounds of its own, which are not trained.

    Args:
        bounds: (low, high) that all channels start with.
        channels: number of channels.
        trailing: number of axes behind that of the channels.
    """

    def __init__(self, bounds: tuple[float, float], channels: int, trailing: int) -> None:
        super().__init__()
        shape = (channels, *[1] * trailing)
        self.low, self.high = (nn.Parameter(torch.full(shape, bound), requires_grad=False) for bound in bounds)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.low.to(x.dtype), self.high.to(x.dtype))

    def divide(self, factor: Tensor) -> None:
        """Divide both bounds of each channel by a positive factor, [channels], in place."""
        with torch.no_grad():
            # clip(x, low, high) / s = clip(x / s, low / s, high / s) for s > 0.
            for bound in (self.low, self.high):
                bound.div_(factor.to(bound).reshape(bound.shape))


def channel_clip_at(node: fx.Node) -> ChannelClip | None:
    """Return the clip by channel that a node calls; None for any other node."""
    module = Op(node).module
    return module if isinstance(module, ChannelClip) else None


def insert_channel_clip(region: CapturedModule, node: fx.Node, name: str) -> None:
    """Replace a ReLU6 or another clip to constant bounds by a clip by channel with the same bounds, in place.

    A second call has no effect.

    Args:
        region: the part of the model that the clip is in.
        node: the clip.
        name: its name in the plan.

    Raises:
        PlacementError: the operator is no clip to constant bounds, or does not read a layer's channels.
    """
    if channel_clip_at(node) is not None:
        return
    bounds = Op(node).bounds
    axis = _axis_of_channels(node)
    if bounds is None or axis is None:
        raise PlacementError(
            f"{name} is a {Op(node).name} that does not clip the channels of a layer to constant bounds, so it cannot "
            "have bounds by channel. Name ReLU6, hardtanh and clamp operators behind a layer only."
        )
    shape = Op(node).shape
    clip = ChannelClip(bounds, int(shape[axis]), len(shape) - axis - 1)
    path = f"channel_clips.{name.replace('.', '_').replace(':', '_')}"
    device = next((parameter.device for parameter in region.parameters()), None)
    place(region, path, clip.to(device).train(region.training))
    # Plans name tensors by their operators, so the new operator would give the tensor another name.
    keep_tensor_name(node, name.rpartition(":")[2])
    replace_call(node, path, node.all_input_nodes[:1])


def _axis_of_channels(node: fx.Node) -> int | None:
    """Return the axis that the channels of the layer before a tensor lie on; None where an operator has mixed them."""
    op = Op(node)
    if op.kind in WEIGHTED:
        return channel_axis(node, node)
    if not op.inputs:
        return None
    # Up to the layer by recursion, and from there down again: each operator maps the axis before it to the axis behind
    # it.
    axis = _axis_of_channels(op.inputs[0].node)
    if axis is None or op.bounds is not None or channel_clip_at(node) is not None or _passes_whole(node):
        return axis
    return op.factor_axis(axis)


def _passes_whole(node: fx.Node) -> bool:
    """Return True for an operator that passes a tensor with its shape: of training alone, or a quantizer."""
    return kind_of(node) is OperatorKind.IDENTITY or isinstance(Op(node).module, Quantizer)
