"""Cross-layer equalization: factors move between consecutive layers until their channels have equal weight ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.1 and 4.2
(arXiv:1906.04721); white paper, section 3.2 (arXiv:2106.08295). For f(s x) = s f(x), s > 0, dividing a channel by s
before f and multiplying the weights that read it by s changes the ranges of both weights and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.graph.batchnorm import keep_statistics, kept_statistics
from halfeven.graph.view import Op, module_of
from halfeven.layerwise.float_equivalence import preserving_the_float_function
from halfeven.placement.channel_clip import ChannelClip, channel_clip_at
from halfeven.placement.graph_edits import record_changes
from halfeven.placement.make_plan import named_nodes, regions
from halfeven.placement.quantized_layers import output_channels
from halfeven.ptq.data_free.moment_propagation import propagated
from halfeven.ptq.data_free.moments import Distribution, after_clip, after_function
from halfeven.ptq.equalization.layer_pairs import (
    LayerPair,
    find_layer_pairs,
    input_ranges,
    is_depthwise,
    output_ranges,
    rewritable_layers,
    weight_by_channel,
)

DEAD_CHANNEL_RATIO = 1e-6
"""A channel with a range below this fraction of its layer's largest is dead and keeps its scale: a factor that lifts
rounding noise to a range would multiply the channel's bias as much."""


# The mathematics


def equalizing_factors(ranges: Sequence[Tensor]) -> Tensor:
    """Return the factors between consecutive layers that make all ranges of a channel equal.

    With g the geometric mean of a channel's ranges r_0 ... r_n, the factor between layers i and i + 1 is
    s_i = (r_0 ... r_i) / g^(i+1): layer i, divided by s_i and multiplied by s_(i-1), has the range g. For a pair it is
    sqrt(r_0 / r_1), for a depthwise triple r_0 / g and g / r_2.

    Args:
        ranges: ranges of n + 1 layers, [channels] each.

    Returns:
        [n, channels] in float64; 1 for channels that are dead, or not finite, in one of the layers.
    """
    # White paper, section 3.2, for a chain of any length; the products of ranges become sums of logarithms, which
    # neither overflow nor underflow.
    r = torch.stack(list(ranges)).double()
    finite = torch.where(torch.isfinite(r), r, 0.0)
    live = (finite > DEAD_CHANNEL_RATIO * finite.amax(1, keepdim=True)).all(0)
    # log s_i = sum over j <= i of (log r_j - log g)
    logs = torch.where(live, r, 1.0).log()
    # The last sum is 0 by construction: behind the chain nothing is scaled.
    return (logs - logs.mean(0)).cumsum(0)[:-1].exp()


def divide_outputs(layer: Any, factor: Tensor) -> None:
    """Divide a layer's output channels by a factor each, [outputs], in weight, bias and recorded statistics."""
    weight = weight_by_channel(layer)
    factor = factor.to(weight)
    weight.div_(broadcast_along(factor, weight, 1))
    # Bias, mean and standard deviation of an output have its unit, so they are divided with the weights.
    if layer.bias is not None:
        layer.bias.div_(factor)
    if (kept := kept_statistics(layer)) is not None:
        keep_statistics(layer, *(values / factor.to(values) for values in kept))


def multiply_inputs(layer: Any, factor: Tensor) -> None:
    """Multiply the weights that read a layer's input channels by a factor each, [inputs]."""
    weight = weight_by_channel(layer, len(factor))
    weight.mul_(broadcast_along(factor.to(weight), weight, 2))


def broadcast_along(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return values of channels shaped to broadcast with a weight by channel along axis 1 (outputs) or 2 (inputs)."""
    shape = [len(weight), *(1,) * (weight.ndim - 1)]
    shape[axis] = -1
    return values.reshape(shape)


# The walk over the model


@dataclass(frozen=True)
class Chain:
    """Consecutive layers whose ranges are made equal together; all except the first and the last are depthwise."""

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]


class _ScaledLayer:
    """A layer while its factors are sought, which are kept apart from the weight until they have settled.

    The largest |weight| of each pair of an output and an input channel stands for the weight.
    """

    def __init__(self, layer: Any, inputs: int | None) -> None:
        # [groups, outputs of a group, inputs of a group, *window]; below, the largest of each window.
        weight = weight_by_channel(layer, inputs).abs()
        self.layer = layer
        self.largest = weight.flatten(3).amax(3) if weight.ndim > 3 else weight
        self.divisor = torch.ones_like(output_ranges(self.largest), dtype=torch.float64)
        self.factor = torch.ones_like(input_ranges(self.largest), dtype=torch.float64)

    def divide(self, divisor: Tensor) -> None:
        self.divisor *= divisor
        self.largest /= broadcast_along(divisor.to(self.largest), self.largest, 1)

    def multiply(self, factor: Tensor) -> None:
        self.factor *= factor
        self.largest *= broadcast_along(factor.to(self.largest), self.largest, 2)

    def apply(self) -> None:
        divide_outputs(self.layer, self.divisor)
        multiply_inputs(self.layer, self.factor)


def _equalize_chains_once(chains: Sequence[Sequence[_ScaledLayer]]) -> float:
    """Make the ranges of each chain equal in turn, and return the largest distance of a factor from 1."""
    worst = 0.0
    for chain in chains:
        # The first layer counts by what it writes to each channel, the others by what reads it. In a depthwise layer
        # the two are the same weights.
        factors = equalizing_factors(
            [output_ranges(chain[0].largest), *(input_ranges(scaled.largest) for scaled in chain[1:])]
        )
        for factor, producer, consumer in zip(factors, chain, chain[1:], strict=False):
            producer.divide(factor)
            consumer.multiply(factor)
        worst = max(worst, float((factors - 1).abs().max()))
    return worst


@dataclass(frozen=True, kw_only=True)
class EqualizationReport:
    """Result of `equalize`."""

    chains: tuple[tuple[str, ...], ...]
    """Names of the layers that were equalized together."""
    sweeps: int
    """Number of passes over all chains."""
    converged: bool
    """True if all factors of the last sweep were within the tolerance of 1."""
    spread: dict[str, tuple[float, float]]
    """Layer -> largest over smallest range of its output channels, before and after, without dead channels."""
    left: tuple[str, ...] = ()
    """Layers that could not take part, with the reason."""

    def __str__(self) -> str:
        if not self.chains:
            return "Equalization: no two layers follow each other without a branch, so nothing was changed."
        ended = "converged" if self.converged else "not converged"
        lines = [
            f"Equalization: {len(self.chains)} chains, {self.sweeps} sweeps, {ended}. Ranges must be set again.",
            *(f"  {' -> '.join(chain)}" for chain in self.chains),
            "  largest / smallest channel range of a weight:",
            *(f"    {name}: {before:.1f} -> {after:.1f}" for name, (before, after) in self.spread.items()),
        ]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


@checked_arguments(AlgorithmError)
@torch.no_grad()
def equalize(
    qmodel: nn.Module, *, max_sweeps: int = 20, tolerance: float = 1e-3, across_clips: bool = False
) -> EqualizationReport:
    """Equalize the channel ranges of consecutive layers, in place; the float function is preserved.

    Chains share layers, so that all are equalized again and again until the factors settle. ReLU6 ends a chain unless
    `across_clips` gives it bounds by channel, or `unclip_relu6` has made a ReLU of it. Earlier ranges of weights and
    activations must be set again.

    Args:
        qmodel: a model from `prepare` with `batchnorm="fold"`.
        max_sweeps: largest number of passes over all chains.
        tolerance: distance of factors from 1 at which the passes end.
        across_clips: pass ReLU6, hardtanh and clamp operators, whose bounds are divided by each channel's factor: one
            more operator in the deployed model each. The plan records them.

    Raises:
        AlgorithmError: the float function was not preserved; the weights are restored.
    """
    # What takes part: chains of layers that alone read each other.
    layers, left = rewritable_layers(qmodel)
    chains = find_chains(layers, across_clips=across_clips)
    members = {name: layer for chain in chains for name, layer in zip(chain.names, chain.layers, strict=True)}
    # The spread of the ranges now, for the report; then the factors; then weights and bounds, all at once.
    before = {name: _range_spread(layer) for name, layer in members.items()}
    scaled = _scaled_layers(chains)
    sweeps = 0
    converged = not chains
    # Only the factors and the largest weights are followed here. The weights are multiplied once, at the end, so that
    # they are rounded once.
    while not converged and sweeps < max_sweeps:
        converged = _equalize_chains_once([[scaled[layer] for layer in chain.layers] for chain in chains]) <= tolerance
        sweeps += 1
    # All channels of these clips start with the common bounds, so the float function is still the same before the
    # factors are applied.
    clips = _give_bounds_by_channel(qmodel, layers) if across_clips else {}
    with preserving_the_float_function(qmodel, "Equalization"):
        for scaled_layer in scaled.values():
            scaled_layer.apply()
        for clip, producer in clips.items():
            clip.divide(scaled[producer].divisor)
    return EqualizationReport(
        chains=tuple(chain.names for chain in chains),
        sweeps=sweeps,
        converged=converged,
        spread={name: (before[name], _range_spread(layer)) for name, layer in members.items()},
        left=left,
    )


def scaled_layers(qmodel: nn.Module) -> set[str]:
    """Return the names of the layers whose output channels `equalize` may scale, with clips between layers passed."""
    return {name for chain in find_chains(rewritable_layers(qmodel)[0], across_clips=True) for name in chain.names[:-1]}


def clips_between_layers(qmodel: nn.Module) -> tuple[str, ...]:
    """Return the names of the ReLU6 and other clips to constant bounds that stand between two layers."""
    layers, _ = rewritable_layers(qmodel)
    clips = {clip for pair in find_layer_pairs(layers, through_clips=True) for clip in pair.clips}
    return tuple(name for name, (_, node) in named_nodes(qmodel).items() if node in clips)


def _give_bounds_by_channel(qmodel: nn.Module, layers: dict[str, fx.Node]) -> dict[ChannelClip, nn.Module]:
    """Give the clips between layers bounds by channel, and return each with the layer whose channels it clips."""
    producers = {clip: pair.producer for pair in find_layer_pairs(layers, through_clips=True) for clip in pair.clips}
    names = {node: name for name, (_, node) in named_nodes(qmodel).items()}
    record_changes(qmodel, clipped_by_channel=tuple(names[node] for node in producers))
    found = {channel_clip_at(node): module_of(producer) for node, producer in producers.items()}
    return {clip: producer for clip, producer in found.items() if clip is not None}


def find_chains(layers: dict[str, fx.Node], *, across_clips: bool = False) -> list[Chain]:
    """Return all chains among the layers of `rewritable_layers`, in the order of the graph.

    Args:
        layers: layers by name.
        across_clips: pass ReLU6 and other clips too.
    """
    pairs = find_layer_pairs(layers, through_clips=across_clips)
    linked: dict[fx.Node, LayerPair] = {pair.producer: pair for pair in pairs}
    # A depthwise layer that reads a linked layer is found on the way of the chain before it, and begins none.
    consumers = {pair.consumer for pair in linked.values()}
    names = {node: name for name, node in layers.items()}
    chains = []
    for node in linked:
        if node in consumers and is_depthwise(module_of(node)):
            continue  # inside a chain
        # A depthwise layer has one factor for what it reads and writes, so that a chain goes on through it; any other
        # layer ends one chain and may begin the next.
        chain = [node, linked[node].consumer]
        while chain[-1] in linked and is_depthwise(module_of(chain[-1])):
            chain.append(linked[chain[-1]].consumer)
        chains.append(Chain(tuple(names[layer] for layer in chain), tuple(module_of(layer) for layer in chain)))
    return chains


def _scaled_layers(chains: Sequence[Chain]) -> dict[nn.Module, _ScaledLayer]:
    """Return the layers of all chains, each with its weight split by the channels of the layer that it reads."""
    read = {
        consumer: output_channels(producer)
        for chain in chains
        for producer, consumer in zip(chain.layers, chain.layers[1:], strict=False)
    }
    return {layer: _ScaledLayer(layer, read.get(layer)) for chain in chains for layer in chain.layers}


def _range_spread(layer: nn.Module) -> float:
    ranges = output_ranges(weight_by_channel(layer))
    live = ranges[ranges > DEAD_CHANNEL_RATIO * ranges.max()]
    return float(live.max() / live.min()) if live.numel() else 1.0


@checked_arguments(AlgorithmError)
def unclip_relu6(qmodel: nn.Module, *, least_sqnr: float | None = None) -> tuple[str, ...]:
    """Replace ReLU6 and clamp operators between two layers by ReLU, in place, and return their names.

    The float function changes for values above the bound: compare its accuracy before and after. The change is recorded
    in the plan. Bounded operators elsewhere, such as inside a hard-swish, stay.

    Args:
        qmodel: a model from `prepare` with `batchnorm="fold"`.
        least_sqnr: smallest SQNR in dB (see `unclipping_sqnr`) of an operator that is replaced; None: all are.
    """
    found = unclipping_sqnr(qmodel)
    names = tuple(name for name, sqnr in found.items() if least_sqnr is None or sqnr >= least_sqnr)
    record_changes(qmodel, unclipped=names)
    return names


@checked_arguments(AlgorithmError)
@torch.no_grad()
def unclipping_sqnr(qmodel: nn.Module) -> dict[str, float]:
    """Return the SQNR in dB that the values of each operator would keep if `unclip_relu6` replaced it, by name.

    It is E[clip(x)^2] / E[(relu(x) - clip(x))^2] for the distribution of x that BatchNorm measured, and minus infinity
    where no distribution of x is known.
    """
    layers, _ = rewritable_layers(qmodel)
    pairs = find_layer_pairs(layers, through_clips=True)
    clips = {node: bounds for pair in pairs for node, bounds in _upper_clips(pair).items()}
    known = {node: x for region in regions(qmodel).values() for node, x in propagated(region).items()}
    return {
        name: _sqnr_without_bound(known.get(Op(node).inputs[0].node), clips[node][1])
        for name, (_, node) in named_nodes(qmodel).items()
        if node in clips
    }


def _upper_clips(pair: LayerPair) -> dict[fx.Node, tuple[float, float]]:
    bounds = {node: Op(node).bounds for node in pair.between}
    return {node: ends for node, ends in bounds.items() if ends is not None and ends[0] == 0 < ends[1] < float("inf")}


def _sqnr_without_bound(x: Distribution | None, bound: float) -> float:
    """Return the SQNR in dB that values keep without their upper bound."""
    if x is None:
        return float("-inf")
    # White paper, section 3.2: ReLU6 does not commute with a factor. `lost` is what a ReLU lets through and ReLU6 does
    # not.
    kept = after_clip(x, 0.0, bound)
    lost = after_function(x, lambda values: (values - bound).clamp(min=0))
    signal = _mean_power(kept)
    noise = _mean_power(lost)
    return 10 * math.log10(signal / noise) if signal and noise else float("inf")


def _mean_power(x: Distribution) -> float:
    return float((x.mean**2 + x.std**2).sum())
