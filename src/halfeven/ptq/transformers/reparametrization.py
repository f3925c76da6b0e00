"""Reparametrization: all channels after a LayerNorm get the same range, and the layers that read it the difference.

Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", section 3.2
(arXiv:2212.08254). Factors and offsets move as in `halfeven.ptq.transformers.smoothing`; here they are chosen so that a
scale per channel, which the activations need, becomes one scale per tensor, which the runtime has.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.layerwise.float_equivalence import preserving_the_float_function
from halfeven.placement.graph_edits import give_bias
from halfeven.ptq.transformers.layernorms import (
    LayerNormReport,
    channel_ranges,
    give_rescalings,
    layernorm_groups,
    live_channels,
    move_affine,
    range_spread,
)

# The mathematics


def to_common_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor r and offset c of each channel for which X' = (X - c) / r has the same range in all channels.

    The common extent, high - low, is the mean of the channels', and zero lies in it where it lies in the channels on
    average: in RepQ-ViT's words, scales and zero points per channel become their means. Zero points are not
    rounded, because those of the channels never run.

    Args:
        low, high: ends of the channels' ranges, [channels].

    Returns:
        r and c, [channels] each, float64; 1 and 0 for dead channels.
    """
    extent = (high - low).double()
    low = low.double()
    live = live_channels(extent)
    if not bool(live.any()):
        return torch.ones_like(extent), torch.zeros_like(extent)
    # RepQ-ViT, section 3.2: the common scale s~ and zero point z~ are the means over the channels; r1 = s / s~ and r2 =
    # z - z~ are written here as r = extent / common and c.
    common = extent[live].mean()
    # Position of zero as a fraction of the extent; inside it, because padding brings zeros in.
    zero = (-low[live] / extent[live]).mean().clamp(0, 1)
    r = extent / common
    # The offset that puts the channel's own low end on the common low end: (low - c) / r = -zero * common.
    c = low + r * zero * common
    return torch.where(live, r, 1.0), torch.where(live, c, 0.0)


# The walk over the model


@checked_arguments(AlgorithmError)
@torch.no_grad()
def reparametrize(
    qmodel: nn.Module, loader: Iterable[Any], *, observer: str = "percentile", batches: int | None = None
) -> LayerNormReport:
    """Give all channels after a LayerNorm the same range, and its linear layers the difference (RepQ-ViT), in place.

    The float function is preserved. Linear layers without a bias get one, which is recorded in the plan. Earlier ranges
    of weights and activations must be set again.

    Args:
        qmodel: a model from `prepare`.
        loader: batches, as for `calibrate`.
        observer: estimator of the channels' ranges, a name of `halfeven.quantization.observers.OBSERVERS`.
        batches: largest number of batches to read; None: all.

    Raises:
        AlgorithmError: the float function was not preserved; the weights are restored.
        CalibrationError: the loader is empty, or a batch gave NaN or infinity.
    """
    groups, left = layernorm_groups(qmodel)
    ranges = channel_ranges(qmodel, groups, loader, observer, batches)
    rescalings = give_rescalings(qmodel, groups)
    for group in groups:
        # W c goes into the bias of the layer that reads the tensor, which some layers do not have.
        for name in group.linear_names:
            give_bias(qmodel, name)
    spreads = {}
    with preserving_the_float_function(qmodel, "Reparametrization"):
        for group, rescaling, (low, high) in zip(groups, rescalings, ranges, strict=True):
            if group.offset is None:  # there is no offset to move: a range even about 0 needs none
                high = torch.maximum(-low, high)
                low = -high
            r, c = to_common_range(low, high)
            move_affine(group.norm, group.linears, rescaling, r, c)
            spreads[group.name] = (range_spread(high - low), range_spread((high - low) / r))
    return LayerNormReport("Reparametrization", spreads, {group.name: group.linear_names for group in groups}, left)
