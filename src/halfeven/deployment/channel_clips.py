"""Clips by channel as runtimes compute them: on integers, behind the kernel of the layer.

No runtime fuses a minimum with a constant of each channel into a layer's kernel. The layer therefore ends with the
tensor's quantizer, as it does elsewhere, and its integers are clipped: rounding is monotonic, so that
Q(min(x, c)) = Q(min(Q(x), Q(c))).
"""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.grids import quantizer_at
from halfeven.deployment.quantize_op import ExportedQuantizer, twin_of
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import record_value
from halfeven.placement.channel_clip import ChannelClip, channel_clip_at
from halfeven.placement.make_plan import regions

aten = torch.ops.aten


def write_channel_clips(model: nn.Module, exported: list[ExportedQuantizer]) -> None:
    """Write the clips by channel of a deployed model as a clip of the tensor, its quantizer and a clip of its integers.

    Args:
        model: a deployed model, which is changed in place.
        exported: its quantizers, to which the new ones are added.
    """
    for name, region in regions(model).items():
        prefix = f"{name}." if name else ""
        for node in list(region.graph.nodes):
            if (clip := channel_clip_at(node)) is not None:
                _write_clip(region, node, clip, prefix, exported)
        region.recompile()


def _write_clip(
    region: CapturedModule, node: fx.Node, clip: ChannelClip, prefix: str, exported: list[ExportedQuantizer]
) -> None:
    """Write one clip by channel; without a quantizer behind it, as a clip of real numbers."""
    path = f"{node.target}_quantizer"
    (source,) = node.all_input_nodes
    quantizer = quantizer_at(next(iter(node.users))) if len(node.users) == 1 else None
    ends = (float(clip.low.min()), float(clip.high.max()))
    with region.graph.inserting_before(node):
        # First the whole tensor, to the widest bounds of any channel: such a clip is fused into the layer's kernel.
        clipped = region.graph.call_function(aten.clamp.default, (source, *map(_clamp_bound, ends)))
    clipped.meta = dict(node.meta)
    # Then what the channels' own bounds clip further, behind the quantizer where there is one.
    low, high = clip.low.detach(), clip.high.detach()
    if quantizer is not None:
        twin = twin_of(quantizer, f"{prefix}{path}", exported)
        twin.repeats = True
        place(region, path, twin)
        with region.graph.inserting_before(node):
            before = clipped
            clipped = region.graph.call_module(path, (before,))
        clipped.meta = dict(node.meta)
        # On the grid itself, so that no number that a kernel computes lies between two integers.
        low, high = (quantizer(bound) for bound in (low, high))
    for extreme, bound in ((aten.maximum.default, low), (aten.minimum.default, high)):
        if bool((bound != bound.flatten()[0]).any()):  # else the clip of the whole tensor has done it
            clipped = insert_bound(region, node, extreme, clipped, bound)
    node.replace_all_uses_with(clipped)
    region.graph.erase_node(node)


def _clamp_bound(bound: float) -> float | None:
    """Return a bound as `clamp` takes it: None for none."""
    return bound if math.isfinite(bound) else None


def insert_bound(region: CapturedModule, node: fx.Node, extreme: Any, x: fx.Node, bound: Tensor) -> fx.Node:
    """Insert the maximum or minimum of `x` and a constant of each channel before a node whose result has the shape."""
    name = f"{node.name}_{extreme.overloadpacket.__name__}"
    region.register_buffer(name, bound)
    with region.graph.inserting_before(node):
        constant = region.graph.get_attr(name)
        result = region.graph.call_function(extreme, (x, constant))
    record_value(constant, bound)
    result.meta = dict(node.meta)
    return result
