"""Clips behind arithmetic with a constant of each channel, in the form that OpenVINO computes right.

The plugin (2026.4) moves such a product or sum into the ends of the quantizer behind, which are then those of a
channel. A clip between it moves into the same kernel, which mistakes its bounds where the batch is free: outputs were
off by half of their size. A minimum and a maximum with a constant of each channel stay operators of their own.
"""

import math

import torch
from torch import fx

from halfeven.deployment.channel_clips import insert_bound
from halfeven.deployment.grids import quantizer_at
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, kind_of
from halfeven.targets.openvino import ARITHMETIC, is_of_channels

aten = torch.ops.aten


def write_clips_of_channels(region: CapturedModule) -> None:
    """Write the clips of a region that stand between arithmetic of channels and a quantizer, in place."""
    for node in list(region.graph.nodes):
        if (quantizer := quantizer_at(node)) is None:
            continue
        # The first of the clips before the quantizer: behind a minimum and a maximum, others are harmless.
        clip = node
        while (source := clip.all_input_nodes[0]).op != "placeholder" and _has_both_ends(Op(source).bounds):
            clip = source
        bounds = quantizer.bounds if clip is node else Op(clip).bounds
        if bounds is None or (shape := _shape_of_channels(source)) is None:
            continue
        clipped = source
        for extreme, bound in zip((aten.maximum.default, aten.minimum.default), bounds, strict=True):
            clipped = insert_bound(region, clip, extreme, clipped, torch.full(shape, bound))
        if clip is node:  # the clip of a grid narrower than 8 bits, which its quantizer held
            node.replace_input_with(source, clipped)
            quantizer.bounds = None
        else:
            clip.replace_all_uses_with(clipped)
            region.graph.erase_node(clip)


def _has_both_ends(bounds: tuple[float, float] | None) -> bool:
    return bounds is not None and all(map(math.isfinite, bounds))


def _shape_of_channels(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of the last constant of channels that a result was multiplied by or that was added, or None."""
    found = None
    # Products and sums with numbers move on together with those of channels.
    while node.target in ARITHMETIC and not node.kwargs:
        computed = [operand for operand in node.all_input_nodes if not Op(operand).is_constant]
        constants = [operand for operand in node.all_input_nodes if Op(operand).is_constant]
        if len(computed) != 1:
            return None
        for constant in constants:
            if found is None and is_of_channels(shape := Op(constant).shape, Op(node).ndim):
                found = shape
        (node,) = computed
    # An average has a kernel that takes in the quantizer behind, and mistakes nothing.
    return None if kind_of(node) is OperatorKind.AVERAGE else found
