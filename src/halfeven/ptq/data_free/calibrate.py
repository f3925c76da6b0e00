"""Quantization without data: activation ranges and bias correction from the statistics of BatchNorm.

White paper, sections 3.1 and 3.3 (arXiv:2106.08295); Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", section 4.2 (arXiv:1906.04721).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import AlgorithmError
from halfeven.graph.view import module_of
from halfeven.layerwise.calibrate import set_weight_ranges
from halfeven.placement.graph_edits import give_bias
from halfeven.placement.make_plan import regions
from halfeven.ptq.data_free.moment_propagation import NORMALIZED, Inputs, input_moments, propagated, transposed_share
from halfeven.ptq.data_free.moments import Distribution
from halfeven.ptq.equalization.layer_pairs import apply_to_constant, rewritable_layers, weight_by_channel
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.quantizer import Quantizer


def mean_shift(layer: Any, quantized_weight: Tensor, mean: Tensor) -> Tensor:
    """What a quantized weight adds to the mean of each output, [outputs], for inputs with this mean, [inputs].

    E[W_q x] - E[W x] = sum over channels c of (sum over the kernel of (W_q - W)[., c]) E[x_c] (white paper, section
    3.3); borders with zero padding are left aside.
    """
    error = weight_by_channel(layer, weight=quantized_weight - layer.weight).double()
    return apply_to_constant(error, mean.to(error)) * transposed_share(layer)


@dataclass(frozen=True, kw_only=True)
class RangeReport:
    """What `ranges_from_batchnorm` set."""

    ranges: dict[str, tuple[float, float]]
    """Tensors with the ends of their ranges."""
    estimated: tuple[str, ...]
    """Those of them that no BatchNorm measured: their ranges were computed from weights, for the inputs assumed."""

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


@torch.no_grad()
def ranges_from_batchnorm(qmodel: nn.Module, *, alpha: float = 6.0, inputs: Inputs = NORMALIZED) -> RangeReport:
    """Set the ranges of all quantizers without data, as `calibrate` does with it.

    An activation's range is from the smallest beta - alpha |gamma| to the largest beta + alpha |gamma| of its channels,
    through the activation function (white paper, section 3.1). Weights get theirs from the weights; fixed ranges stay.

    Args:
        qmodel: a model from `prepare`.
        alpha: standard deviations to each side of the mean.
        inputs: what is known of the model's inputs.

    Raises:
        AlgorithmError: nothing is known of some tensors; they are named, and no range is set.
    """
    places = _places(qmodel, alpha, inputs)
    unknown = [q.name for q, known in places.items() if not known or None in known]
    if unknown:
        raise AlgorithmError(
            f"Nothing is known without data of {', '.join(unknown[:5])}{' and others' if len(unknown) > 5 else ''}: no "
            "BatchNorm leads there, or an operator that gives no estimate is between. Give a loader with a few batches."
        )
    set_weight_ranges(qmodel)
    ranges, estimated = {}, []
    for quantizer, known in places.items():
        tensors = [one for one in known if one is not None]
        low, high = min(t.low.min() for t in tensors), max(t.high.max() for t in tensors)
        quantizer.set_range(low.to(quantizer.scale), high.to(quantizer.scale))
        ranges[quantizer.name] = (float(low), float(high))
        estimated += [] if all(t.measured for t in tensors) else [quantizer.name]
    return RangeReport(ranges=ranges, estimated=tuple(estimated))


def _places(qmodel: nn.Module, alpha: float, inputs: Inputs) -> dict[Quantizer, list[Distribution | None]]:
    """The quantizers of activations whose ranges are to be set, with what is known of the tensors they quantize."""
    found: dict[Quantizer, list[Distribution | None]] = {}
    for name, region in regions(qmodel).items():
        known = propagated(region, alpha=alpha, inputs=None if name else inputs)
        for node in region.graph.nodes:
            quantizer = module_of(node) if node.op == "call_module" else None
            if isinstance(quantizer, Quantizer) and not (quantizer.weight or quantizer.state.fixed):
                found.setdefault(quantizer, []).append(known.get(node))
    return found


@dataclass(frozen=True, kw_only=True)
class AnalyticCorrectionReport:
    """What `correct_biases_analytically` did."""

    shifts: dict[str, float]
    """Layers, with the largest shift of a channel's mean that was taken from the bias."""
    left: tuple[str, ...] = ()
    """Layers that were not corrected, with the reason."""

    def __str__(self) -> str:
        lines = [f"Analytic bias correction: {len(self.shifts)} layers. Ranges of activations must be set anew."]
        lines += [f"  {name}: a channel's mean by up to {shift:.3g}" for name, shift in self.shifts.items()]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


@torch.no_grad()
def correct_biases_analytically(qmodel: nn.Module, *, inputs: Inputs = NORMALIZED) -> AnalyticCorrectionReport:
    """Take from the biases what the rounding of weights adds to the channels' means, without data.

    The means of a layer's inputs follow from BatchNorm. Layers without a bias get one, which is recorded in the plan.
    Weights without a range get theirs as in calibration; ranges of activations that were set before must be set anew.

    Args:
        qmodel: a model from `prepare` with `batchnorm="fold"`.
        inputs: what is known of the model's inputs.
    """
    layers, left = rewritable_layers(qmodel)
    known: dict[fx.Node, Distribution] = {}
    for region_name, region in regions(qmodel).items():
        known |= propagated(region, inputs=None if region_name else inputs)
    set_weight_ranges(qmodel, missing_only=True)
    shifts, unknown = {}, []
    for name, node in layers.items():
        layer: Any = module_of(node)
        if not hasattr(layer, "weight_quantizer"):
            continue
        if (x := known.get(node.all_input_nodes[0])) is None:
            unknown.append(f"{name} (nothing is known of its input)")
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
