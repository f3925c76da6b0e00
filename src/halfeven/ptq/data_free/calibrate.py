"""Calibrate and correct biases without data, from the statistics of BatchNorm.

White paper, sections 3.1 and 3.3 (arXiv:2106.08295); Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", section 4.2 (arXiv:1906.04721).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.graph.view import Op, module_calls
from halfeven.layerwise.calibrate import set_weight_ranges
from halfeven.placement.graph_edits import give_bias
from halfeven.placement.make_plan import regions
from halfeven.ptq.data_free.moment_propagation import (
    NORMALIZED,
    InputDistribution,
    input_moments,
    propagated,
    transposed_share,
)
from halfeven.ptq.data_free.moments import Distribution
from halfeven.ptq.equalization.layer_pairs import apply_to_constant, rewritable_layers, weight_by_channel
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.model_quantizers import has_quantized_weight
from halfeven.quantization.quantizer import Quantizer


def mean_shift(layer: Any, quantized_weight: Tensor, mean: Tensor) -> Tensor:
    """Return the shift of each output's mean by the quantization of a weight.

    E[W_q x] - E[W x] = sum over channels c of (sum over the kernel of (W_q - W)[., c]) E[x_c] (white paper, section
    3.3); borders with zero padding are left aside.

    Args:
        layer: the layer with its float weight W.
        quantized_weight: W_q, shaped like W.
        mean: E[x], [inputs].

    Returns:
        [outputs], float64.
    """
    # A mean is the same at every position, so the kernel's window is summed before the product with it.
    error = weight_by_channel(layer, weight=quantized_weight - layer.weight).double()
    return apply_to_constant(error, mean.to(error)) * transposed_share(layer)


@dataclass(frozen=True, kw_only=True)
class RangeReport:
    """Result of `ranges_from_batchnorm`."""

    ranges: dict[str, tuple[float, float]]
    """Tensor -> ends of its range."""
    estimated: tuple[str, ...]
    """Tensors among them that no BatchNorm measured: their ranges follow from weights and the assumed inputs."""

    def __str__(self) -> str:
        lines = [
            f"Ranges without data: {len(self.ranges)} activations, {len(self.estimated)} of them estimated through "
            "layers without BatchNorm.",
            *(
                f"  {name}: {low:.4g} to {high:.4g}{' (estimated)' if name in self.estimated else ''}"
                for name, (low, high) in self.ranges.items()
            ),
        ]
        return "\n".join(lines)


@checked_arguments(AlgorithmError)
@torch.no_grad()
def ranges_from_batchnorm(
    qmodel: nn.Module, *, alpha: float = 6.0, inputs: InputDistribution = NORMALIZED
) -> RangeReport:
    """Set the ranges of all quantizers without data, as `calibrate` does with it.

    An activation's range is from the smallest beta - alpha |gamma| to the largest beta + alpha |gamma| of its channels,
    through the activation function (white paper, section 3.1). Ranges of weights follow from the weights; fixed ranges
    stay.

    Args:
        qmodel: a model from `prepare`.
        alpha: standard deviations on each side of the mean.
        inputs: assumed distribution of the model's inputs.

    Raises:
        AlgorithmError: the distribution of some tensors is unknown; they are named, and no range is set.
    """
    distributions = _distributions_to_set(qmodel, alpha, inputs)
    # All distributions are sought before any range is set: a model with ranges here and none there would be of no use.
    unknown = [q.name for q, known in distributions.items() if not known or None in known]
    if unknown:
        raise AlgorithmError(
            f"Without data, the distribution of {', '.join(unknown[:5])}{' and others' if len(unknown) > 5 else ''} is "
            "unknown, so no range can be set: no BatchNorm leads there, or an operator in between gives no estimate. "
            "Give a loader with a few batches."
        )
    set_weight_ranges(qmodel)
    ranges = {}
    estimated: list[str] = []
    for quantizer, known in distributions.items():
        tensors = [x for x in known if x is not None]
        # A quantizer that several tensors share must cover all of them, and all of their channels.
        low = min(x.low.min() for x in tensors)
        high = max(x.high.max() for x in tensors)
        quantizer.set_range(low.to(quantizer.scale), high.to(quantizer.scale))
        ranges[quantizer.name] = (float(low), float(high))
        if not all(x.measured for x in tensors):
            estimated.append(quantizer.name)
    return RangeReport(ranges=ranges, estimated=tuple(estimated))


def _distributions_to_set(
    qmodel: nn.Module, alpha: float, inputs: InputDistribution
) -> dict[Quantizer, list[Distribution | None]]:
    """Return the activation quantizers whose ranges are to be set, each with the distributions of its tensors."""
    found: dict[Quantizer, list[Distribution | None]] = {}
    for name, region in regions(qmodel).items():
        known = propagated(region, alpha=alpha, inputs=None if name else inputs)
        for op in module_calls(region.graph):
            quantizer = op.module
            if isinstance(quantizer, Quantizer) and not (quantizer.weight or quantizer.state.fixed):
                found.setdefault(quantizer, []).append(known.get(op.node))
    return found


@dataclass(frozen=True, kw_only=True)
class AnalyticCorrectionReport:
    """Result of `correct_biases_analytically`."""

    shifts: dict[str, float]
    """Layer -> largest shift of a channel's mean that was subtracted from its bias."""
    left: tuple[str, ...] = ()
    """Layers that were not corrected, with the reason."""

    def __str__(self) -> str:
        lines = [f"Analytic bias correction: {len(self.shifts)} layers. Ranges of activations must be set again."]
        lines += [f"  {name}: a channel's mean by up to {shift:.3g}" for name, shift in self.shifts.items()]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


@checked_arguments(AlgorithmError)
@torch.no_grad()
def correct_biases_analytically(
    qmodel: nn.Module, *, inputs: InputDistribution = NORMALIZED
) -> AnalyticCorrectionReport:
    """Subtract from the biases the shift of the channels' means by rounded weights, without data, in place.

    The means of a layer's inputs follow from BatchNorm. Layers without a bias get one, which is recorded in the plan.
    Weights without a range get one as in calibration; earlier ranges of activations must be set again.

    Args:
        qmodel: a model from `prepare` with `batchnorm="fold"`.
        inputs: assumed distribution of the model's inputs.
    """
    layers, left = rewritable_layers(qmodel)
    known: dict[fx.Node, Distribution] = {}
    for region_name, region in regions(qmodel).items():
        # The inputs of a region inside of the model are not the model's, so nothing is assumed of them.
        known |= propagated(region, inputs=None if region_name else inputs)
    # The moments above are those of float weights. Ranges are needed for the rounded weights, whose shift is sought.
    set_weight_ranges(qmodel, missing_only=True)
    shifts = {}
    unknown: list[str] = []
    for name, node in layers.items():
        op = Op(node)
        layer: Any = op.module
        # A layer in float shifts nothing.
        if not has_quantized_weight(layer):
            continue
        if (x := known.get(op.inputs[0].node)) is None:
            unknown.append(f"{name} (the distribution of its input is unknown)")
            continue
        mean, _ = input_moments(node, x)
        shift = mean_shift(layer, _quantized_weight(layer), mean)
        give_bias(qmodel, name).sub_(shift.to(layer.weight))
        shifts[name] = float(shift.abs().max())
    return AnalyticCorrectionReport(shifts=shifts, left=left + tuple(unknown))


def _quantized_weight(layer: Any) -> Tensor:
    quantizer: Quantizer = layer.weight_quantizer
    scale = quantizer.used_scale(layer.weight)
    return fake_quantize(layer.weight, scale, quantizer.zero_point, quantizer.scheme)
