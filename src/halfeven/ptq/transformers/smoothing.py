"""Smoothing: outliers of activations after LayerNorm move into the weights that read them (SmoothQuant).

A few channels of a transformer's activations are many times larger than the others, so that one scale for the tensor
serves neither. LayerNorm ends with a factor and an offset of each channel, and a linear layer begins with a sum over
channels. So a factor r > 0 and an offset c of each channel, X = r X' + c, can move from the LayerNorm to the layer, and
the float function is preserved:

    gamma' = gamma / r,   beta' = (beta - c) / r,   W' = W r,   b' = b + W c

Where the residual stream reads the LayerNorm too, as in BERT, it reads r X' + c, in float. SmoothQuant chooses r so
that activations and weights share the difficulty, and c = 0 (Xiao et al., section 4, arXiv:2211.10438).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.layerwise.float_equivalence import preserving_the_float_function
from halfeven.ptq.transformers.layernorms import (
    LayerNormReport,
    channel_ranges,
    give_rescalings,
    layernorm_groups,
    live_channels,
    move_affine,
    range_spread,
)
from halfeven.renamed import renamed_attributes

# The mathematics


def smoothing_factors(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Return r = max|X|^strength / max|W|^(1 - strength) of each channel (SmoothQuant, equation 4).

    Args:
        activations: largest |X|, [channels].
        weights: largest |W| that reads the channel, [channels].
        strength: from 0, which gives the layer's weights the same range for all channels, to 1, which gives it to the
            activations.

    Returns:
        [channels], float64; 1 for a channel that is dead in either.
    """
    x = activations.double()
    w = weights.double()
    # With strength 1/2, activations and weights of a channel get the same largest magnitude: sqrt(max|X| max|W|).
    factor = x.pow(strength) / w.pow(1 - strength)
    return torch.where(live_channels(x) & live_channels(w), factor, 1.0)


# The walk over the model


@checked_arguments(AlgorithmError)
@torch.no_grad()
def smooth(
    qmodel: nn.Module, loader: Iterable[Any], *, strength: float = 0.5, batches: int | None = None
) -> LayerNormReport:
    """Share the outliers after LayerNorm between activations and weights (SmoothQuant), in place.

    The float function is preserved. Earlier ranges of weights and activations must be set again.

    Args:
        qmodel: a model from `prepare`.
        loader: batches, as for `calibrate`.
        strength: fraction of the difficulty that moves to the weights, 0 to 1.
        batches: largest number of batches to read; None: all.

    Raises:
        AlgorithmError: the strength is not from 0 to 1, or the float function was not preserved; the weights are
            restored.
        CalibrationError: the loader is empty, or a batch gave NaN or infinity.
    """
    if not 0 <= strength <= 1:
        raise AlgorithmError(
            f"A smoothing strength of {strength} is outside 0 to 1, where either the activations or the weights become "
            "harder to quantize and the other side does not become easier. Choose a number from 0 to 1; 0.5 shares the "
            "difficulty evenly."
        )
    groups, left = layernorm_groups(qmodel)
    ranges = channel_ranges(qmodel, groups, loader, "minmax", batches)
    rescalings = give_rescalings(qmodel, groups)
    spreads = {}
    with preserving_the_float_function(qmodel, "Smoothing"):
        for group, rescaling, (low, high) in zip(groups, rescalings, ranges, strict=True):
            activations = torch.maximum(-low, high)
            # All layers that read the tensor get the same factor, so the largest weight of any of them counts.
            weights = torch.stack([layer.weight.abs().amax(0) for layer in group.linears]).amax(0)  # [inputs]
            r = smoothing_factors(activations, weights, strength)
            move_affine(group.norm, group.linears, rescaling, r, torch.zeros_like(r))
            spreads[group.name] = (range_spread(high - low), range_spread((high - low) / r))
    return LayerNormReport("Smoothing", spreads, {group.name: group.linear_names for group in groups}, left)


__getattr__ = renamed_attributes(__name__, reparametrize="ptq.transformers.reparametrization.reparametrize")
