"""Outliers after LayerNorm: channels of activations are scaled down, and the weights that read them up.

A few channels of a transformer's activations are many times larger than the others, and one scale for the tensor serves
neither. LayerNorm ends with a factor and an offset of each channel, and a linear layer begins with a sum over channels.
So X = r X' + c, with numbers r > 0 and c for each channel, moves from the one to the other and changes nothing else:

    gamma' = gamma / r,   beta' = (beta - c) / r,   W' = W r,   b' = b + W c

Where the residual stream reads the LayerNorm too, as in BERT, it reads r X' + c, in float.
SmoothQuant chooses r so that activations and weights share the difficulty (Xiao et al., arXiv 2211.10438, section 4).
RepQ-ViT chooses r and c so that all channels of the activations get one range (Li et al., arXiv 2212.08254,
section 3.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import AlgorithmError
from halfeven.layerwise.calibrate import run_batches
from halfeven.layerwise.float_equivalence import float_function, preserving_the_float_function
from halfeven.placement.channel_affine import ChannelAffine, rescaling_of
from halfeven.placement.graph_edits import give_bias, record_changes
from halfeven.placement.make_plan import named_nodes
from halfeven.ptq.transformers.layernorms import NormSite, norm_sites
from halfeven.quantization.observers import make_observer
from halfeven.quantization.scheme import Scheme

DEAD = 1e-6
"""Channels whose range is below this share of the largest stay as they are: their factor would be rounding noise."""


# The mathematics


def smoothing_factors(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """r = max|X|^strength / max|W|^(1 - strength) of each channel; 1 for a channel that is dead in either.

    Args:
        activations: largest |X|, [channels].
        weights: largest |W| that reads the channel, [channels].
        strength: 0 gives all weights of the layer one range over the channels, 1 the activations.

    Returns:
        [channels], float64.
    """
    x, w = activations.double(), weights.double()
    factor = x.pow(strength) / w.pow(1 - strength)
    return torch.where(_live(x) & _live(w), factor, 1.0)


def to_one_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Factor r and offset c of each channel for which X' = (X - c) / r has the same range in all channels.

    Its extent, high - low, is the channels' mean, and zero lies where it does in the mean channel: in RepQ-ViT's words,
    per-channel scales and zero points become their means. Zero points are not rounded, as those of the channels never
    run. Dead channels keep r = 1, c = 0.

    Args:
        low, high: ends of the channels' ranges, [channels].

    Returns:
        r and c, [channels] each, float64.
    """
    low, extent = low.double(), (high - low).double()
    live = _live(extent)
    if not bool(live.any()):
        return torch.ones_like(extent), torch.zeros_like(extent)
    common = extent[live].mean()
    zero = (-low[live] / extent[live]).mean().clamp(0, 1)  # as a share of the extent; inside, for padding's zeros
    r = extent / common
    c = low + r * zero * common
    return torch.where(live, r, 1.0), torch.where(live, c, 0.0)


def _live(extent: Tensor) -> Tensor:
    finite = torch.where(torch.isfinite(extent), extent, 0.0)
    return torch.isfinite(extent) & (finite > DEAD * finite.amax())


def move(
    norm: nn.LayerNorm, readers: Iterable[nn.Linear], rescaling: ChannelAffine | None, r: Tensor, c: Tensor
) -> None:
    """Move X = r X' + c, [channels] each, out of a LayerNorm and into all that reads it: weights, and a rescaling."""
    if rescaling is not None:
        factor = rescaling.factor.double()
        rescaling.offset.copy_(rescaling.offset.double() + factor * c)
        rescaling.factor.copy_(factor * r)
    for layer in readers:
        weight = layer.weight.double()
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() + weight @ c)
        layer.weight.copy_(weight * r)
    if norm.bias is not None:
        norm.bias.copy_((norm.bias.double() - c) / r)
    norm.weight.copy_(norm.weight.double() / r)


# The walk over the model


@dataclass(frozen=True)
class SmoothingReport:
    """What `smooth` or `reparametrize` did."""

    method: str
    spread: dict[str, tuple[float, float]]
    """LayerNorm -> largest over mean range of its output channels, before and after."""
    readers: dict[str, tuple[str, ...]]
    """LayerNorm -> the linear layers that took its factors over."""
    left: tuple[str, ...] = ()
    """LayerNorms that were left alone, with the reason."""

    def __str__(self) -> str:
        if not self.spread:
            lines = [f"{self.method}: no LayerNorm is read by linear layers, so nothing was changed."]
        else:
            lines = [
                f"{self.method}: {len(self.spread)} LayerNorms. Ranges must be set anew.",
                "  largest / mean channel range of an activation:",
                *(
                    f"    {name} -> {', '.join(self.readers[name])}: {before:.1f} -> {after:.1f}"
                    for name, (before, after) in self.spread.items()
                ),
            ]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


@torch.no_grad()
def smooth(
    qmodel: nn.Module, loader: Iterable[Any], *, strength: float = 0.5, batches: int | None = None
) -> SmoothingReport:
    """Share the outliers after LayerNorm between activations and weights (SmoothQuant), in place.

    The float function stays. Ranges of weights and activations that were set before must be set anew.

    Args:
        qmodel: a model from `prepare`.
        loader: batches, as for `calibrate`.
        strength: how much of the difficulty moves to the weights, 0 to 1.
        batches: how many to take; None: all.

    Raises:
        AlgorithmError: the float function did not stay; the weights are as before.
        CalibrationError: no batch came, or one gave NaN or infinity.
    """
    if not 0 <= strength <= 1:
        raise AlgorithmError(
            f"A smoothing strength of {strength} was asked for: beyond 0 to 1 one side gets harder than it was, and "
            "the other no easier. Choose a number from 0 to 1; 0.5 shares the difficulty evenly."
        )
    sites, left = norm_sites(qmodel)
    ranges = channel_ranges(qmodel, sites, loader, "minmax", batches)
    rescalings = give_rescalings(qmodel, sites)
    spread = {}
    with preserving_the_float_function(qmodel, "Smoothing"):
        for site, rescaling, (low, high) in zip(sites, rescalings, ranges, strict=True):
            activations = torch.maximum(-low, high)
            weights = torch.stack([layer.weight.abs().amax(0) for layer in site.readers]).amax(0)
            r = smoothing_factors(activations, weights, strength)
            move(site.norm, site.readers, rescaling, r, torch.zeros_like(r))
            spread[site.name] = (_spread(high - low), _spread((high - low) / r))
    return SmoothingReport("Smoothing", spread, {site.name: site.names for site in sites}, left)


@torch.no_grad()
def reparametrize(
    qmodel: nn.Module, loader: Iterable[Any], *, observer: str = "percentile", batches: int | None = None
) -> SmoothingReport:
    """Give all channels after a LayerNorm one range, and the linear layers what that takes (RepQ-ViT), in place.

    The float function stays. Linear layers without a bias get one, which the plan records. Ranges of weights and
    activations that were set before must be set anew.

    Args:
        qmodel: a model from `prepare`.
        loader: batches, as for `calibrate`.
        observer: estimator of the channels' ranges, a name of `halfeven.quantization.observers.OBSERVERS`.
        batches: how many to take; None: all.

    Raises:
        AlgorithmError: the float function did not stay; the weights are as before.
        CalibrationError: no batch came, or one gave NaN or infinity.
    """
    sites, left = norm_sites(qmodel)
    ranges = channel_ranges(qmodel, sites, loader, observer, batches)
    rescalings = give_rescalings(qmodel, sites)
    for site in sites:
        for name in site.names:
            give_bias(qmodel, name)
    spread = {}
    with preserving_the_float_function(qmodel, "Reparametrization"):
        for site, rescaling, (low, high) in zip(sites, rescalings, ranges, strict=True):
            if site.offset is None:  # a range that is even about 0 needs no offset
                high = torch.maximum(-low, high)
                low = -high
            r, c = to_one_range(low, high)
            move(site.norm, site.readers, rescaling, r, c)
            spread[site.name] = (_spread(high - low), _spread((high - low) / r))
    return SmoothingReport("Reparametrization", spread, {site.name: site.names for site in sites}, left)


def give_rescalings(qmodel: nn.Module, sites: list[NormSite]) -> list[ChannelAffine | None]:
    """What gives the additions that read each LayerNorm its output as it was; recorded in the plan."""
    record_changes(qmodel, rescaled=tuple(site.name for site in sites if site.added))
    nodes = named_nodes(qmodel)
    return [rescaling_of(nodes[site.name][1]) for site in sites]


def _spread(extent: Tensor) -> float:
    return float(extent.amax() / extent.mean()) if bool(extent.any()) else 1.0


def channel_ranges(
    qmodel: nn.Module, sites: list[NormSite], loader: Iterable[Any], observer: str, batches: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Ranges of the channels, the last axis, of what each LayerNorm puts out in the float model, [channels] each."""
    if not sites:
        return []
    seen = [make_observer(observer, Scheme(axis=0)) for _ in sites]
    hooks = [
        site.norm.register_forward_hook(lambda module, inputs, output, one=one: one.update(output.movedim(-1, 0)))
        for site, one in zip(sites, seen, strict=True)
    ]
    try:
        with float_function(qmodel):
            run_batches(qmodel, loader, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return [one.range() for one in seen]
