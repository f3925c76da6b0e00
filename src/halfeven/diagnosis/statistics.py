"""Statistics of each quantized tensor, from the float model's values: what its grid does to them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.diagnosis.exchanged_ranges import planned_quantizers
from halfeven.graph.batches import Inputs
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import kind_of
from halfeven.layerwise.float_equivalence import float_function
from halfeven.layerwise.sqnr import decibels
from halfeven.placement.execution_graph import as_planned
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.plan import PlannedTensor, PlannedWeight
from halfeven.quantization.arithmetic import per_channel
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.quantization.scheme import Scheme

KEPT_VALUES = 16384
"""Values of a tensor that are kept of each batch, evenly spread, for its histogram."""
FAR_SHARE = 0.5
"""Values beyond this share of the largest magnitude are far outside, where the rest lies within `NEAR_SHARE` of it."""
NEAR_SHARE = 1 / 16


@dataclass
class Place:
    """Range of one of the tensors that share a quantizer."""

    low: float = float("inf")
    high: float = float("-inf")

    @property
    def largest(self) -> float:
        """Return the largest magnitude."""
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else 0.0


@dataclass
class TensorStatistics:
    """Values of one quantized tensor and what its grid makes of them."""

    quantizer: Quantizer
    places: list[Place] = field(default_factory=list)
    """Range of each tensor that shares the quantizer, in the order of the plan."""
    channel_largest: dict[int, Tensor] = field(default_factory=dict)
    """Axis -> largest magnitude of each of its channels; axes without a fixed size are left out."""
    channel_signal: dict[int, Tensor] = field(default_factory=dict)
    """Axis -> sum of the squared values of each channel."""
    channel_noise: dict[int, Tensor] = field(default_factory=dict)
    """Axis -> sum of the squared errors of each channel."""
    values: list[Tensor] = field(default_factory=list)
    count: int = 0
    clipped: int = 0
    vanished: int = 0
    """Values other than 0 that are rounded to 0."""
    signal: float = 0.0
    noise: float = 0.0
    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    """The scale in use, [] or [channels]."""
    ragged: set[int] = field(default_factory=set)
    """Axes of several sizes, such as tokens."""
    axes: tuple[int, ...] = (1, -1)
    """Axes of an activation on which the layers that read it have channels; both ends where that is not known."""
    dead_by_channel: float | None = None
    """Mean of the channels' shares of integers that no value is rounded to; None for a single scale."""
    sample_largest: list[Tensor] = field(default_factory=list)
    """Largest magnitude of each sample; empty for a weight."""

    @property
    def sqnr(self) -> float:
        """Return the signal-to-quantization-noise ratio at the tensor in dB."""
        return decibels(self.noise / self.signal) if self.signal else float("inf")

    @property
    def clipped_share(self) -> float:
        """Return the share of values outside of the range."""
        return self.clipped / max(self.count, 1)

    @property
    def vanished_share(self) -> float:
        """Return the share of values that are not 0 and become 0."""
        return self.vanished / max(self.count, 1)

    @property
    def sample(self) -> Tensor:
        """Return the values that were kept, [values]."""
        return torch.cat(self.values) if self.values else torch.empty(0)

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest value that the grid has; of several scales, the widest."""
        scale, zero = self.scale.double(), self.quantizer.used_zero_point().double().cpu()
        scheme = self.quantizer.scheme
        low = float(((scheme.quant_min - zero) * scale).min())
        return low, float(((scheme.quant_max - zero) * scale).max())

    @property
    def dead_levels(self) -> float:
        """Return the share of the grid's integers that no value is rounded to; of several scales, the mean."""
        if self.dead_by_channel is not None:
            return self.dead_by_channel
        scale, zero = self.scale.double(), self.quantizer.used_zero_point().double().cpu()
        values = self.sample
        return _dead_share((torch.round(values / scale) + zero)[None], self.quantizer.scheme) if len(values) else 0.0

    @property
    def extremes(self) -> tuple[float, float]:
        """Return the smallest and the largest value of all places."""
        return min(place.low for place in self.places), max(place.high for place in self.places)

    def range_misfit(self) -> float:
        """Return how far the range and the values differ: the ratio of their sizes, at least 1."""
        low, high = self.bounds
        least, largest = self.extremes
        given, seen = max(abs(low), abs(high)), max(abs(least), abs(largest))
        return max(given / seen, seen / given) if given > 0 and seen > 0 else 1.0

    def far_share(self) -> float:
        """Return the share of values that lie far outside, alone: 0 where the values between are not empty."""
        values = self.sample.abs()
        if not len(values) or not float(values.max()):
            return 0.0
        relative = values / values.max()
        between = ((relative > NEAR_SHARE) & (relative < FAR_SHARE)).double().mean()
        share = float((relative >= FAR_SHARE).double().mean())
        # A mask leaves a gap between its constant and the features; a long tail does not.
        return share if float(between) < 0.05 * share else 0.0

    def far_is_constant(self) -> bool:
        """Return True where all values far outside are about equal, as a mask's are."""
        values = self.sample
        far = values[values.abs() >= FAR_SHARE * values.abs().max()]
        return len(far) > 1 and float(far.std()) <= 0.05 * float(far.abs().mean())

    def channel_outlier(self) -> tuple[int, int, float] | None:
        """Return axis, channel and its largest magnitude over the median channel's, for the axis with the most."""
        found = []
        for axis, largest in self.channel_largest.items():
            median = float(largest.median())
            if len(largest) > 2 and median > 0:
                found.append((axis, int(largest.argmax()), float(largest.max()) / median))
        return max(found, key=lambda row: row[2], default=None)

    def channel_spread(self) -> tuple[int, float] | None:
        """Return axis and the largest channel's magnitude over the smallest live channel's."""
        found = []
        for axis, largest in self.channel_largest.items():
            # A dead channel holds rounding noise, or nothing: a ratio to it says nothing about scales.
            live = largest[largest > 1e-8 * largest.max()]
            if len(live) > 1:
                found.append((axis, float(live.max() / live.min())))
        return max(found, key=lambda row: row[1], default=None)

    def sample_spread(self) -> float:
        """Return the largest sample's magnitude over that of a quiet sample, which nine of ten exceed."""
        if not self.sample_largest:
            return 1.0
        largest = torch.cat(self.sample_largest)
        quiet = float(largest.quantile(0.1))
        return float(largest.max()) / quiet if quiet > 0 else float("inf")

    def worst_channels(self, count: int = 3) -> list[tuple[int, float]]:
        """Return the channels with the lowest SQNR in dB, of the axis where channels differ most."""
        pairs = zip(self.channel_signal.values(), self.channel_noise.values(), strict=True)
        ratios = [noise / signal.clamp(min=1e-30) for signal, noise in pairs]
        ratios = [ratio for ratio in ratios if len(ratio) > 1]
        if not ratios:
            return []
        errors = max(ratios, key=lambda e: float(e.max() / e.median().clamp(min=1e-30)))
        order = errors.argsort(descending=True)[:count]
        return [(int(channel), decibels(float(errors[channel]))) for channel in order]


@torch.no_grad()
def tensor_statistics(qmodel: nn.Module, inputs: Sequence[Inputs]) -> dict[tuple[str, bool], TensorStatistics]:
    """Return the statistics of each quantized tensor by (name, weight), from the float values of these inputs.

    Args:
        qmodel: a calibrated model.
        inputs: arguments of the model, batch by batch.
    """
    found: dict[tuple[str, bool], TensorStatistics] = {}
    known = named_nodes(qmodel)
    # Float values, from graphs in the plan's order: fused graphs move quantizers behind pools, where they see other
    # tensors.
    with float_function(qmodel), as_planned(qmodel), ExitStack() as hooks:
        for quantizer, planned in planned_quantizers(qmodel):
            places = 1 if isinstance(planned, PlannedWeight) else len(planned.places)
            kept = TensorStatistics(quantizer, [Place() for _ in range(places)], axes=_channel_axes(planned, known))
            found[planned.name, quantizer.weight] = kept
            hooks.callback(quantizer.register_forward_pre_hook(_statistics_hook(kept)).remove)
        for args, kwargs in inputs:
            qmodel(*args, **kwargs)
    return found


def _dead_share(codes: Tensor, scheme: Scheme) -> float:
    """Return the share of a grid's integers that none of the codes is, mean over the rows of [channels, values]."""
    ordered = codes.clamp(scheme.quant_min, scheme.quant_max).sort(1).values
    used = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    # n values reach n levels at most.
    return float(1 - used.double().mean() / min(scheme.levels, codes.shape[1]))


def _channel_axes(planned: PlannedTensor | PlannedWeight, known: Mapping[str, tuple[Any, fx.Node]]) -> tuple[int, ...]:
    """Return the axes of an activation on which its readers have channels."""
    readers = planned.consumers if isinstance(planned, PlannedTensor) else ()
    kinds = {kind_of(known[name][1]) for name in readers if name in known}
    if kinds and kinds <= {OperatorKind.CONVOLUTION, OperatorKind.TRANSPOSED_CONVOLUTION}:
        return (1,)
    return (-1,) if kinds == {OperatorKind.LINEAR} else (1, -1)


def _statistics_hook(found: TensorStatistics) -> Any:
    calls = 0

    def watch(quantizer: Quantizer, given: tuple[Any, ...]) -> None:
        nonlocal calls
        # A quantizer that several tensors share is called for each of them in the order of the plan, batch after batch.
        place = found.places[calls % len(found.places)]
        calls += 1
        if quantizer.weight and calls > 1:  # the same weight in every call
            return
        x = given[0].detach()
        quantizer.mode = Mode.QUANTIZE
        try:
            error = quantizer.forward(x) - x  # not through the module's call, which would come back here
        finally:
            quantizer.mode = Mode.FLOAT
        _add_values(found, place, x, error)

    return watch


def _add_values(found: TensorStatistics, place: Place, x: Tensor, error: Tensor) -> None:
    """Count a tensor and the error of its quantization."""
    low, high = torch.aminmax(x)
    place.low = min(place.low, float(low))
    place.high = max(place.high, float(high))
    found.count += x.numel()
    found.signal += float(x.double().square().sum())
    found.noise += float(error.double().square().sum())
    quantizer = found.quantizer
    found.scale = quantizer.used_scale(x).detach().cpu()
    scale = per_channel(quantizer.used_scale(x), quantizer.scheme.axis, x.ndim)
    # Rounding moves a value by half a step at most; what moves further was outside of the range.
    found.clipped += int((error.abs() > 0.501 * scale).sum())
    found.vanished += int(((x != 0) & (x + error == 0)).sum())
    if found.scale.numel() > 1:  # a weight, which is counted once
        zero = per_channel(quantizer.used_zero_point(), quantizer.scheme.axis, x.ndim)
        codes = (torch.round((x + error) / scale) + zero).transpose(0, quantizer.scheme.axis or 0).flatten(1)
        found.dead_by_channel = _dead_share(codes, quantizer.scheme)
    stride = max(x.numel() // KEPT_VALUES, 1)
    found.values.append(x.flatten()[::stride].float().cpu())
    if not quantizer.weight and x.ndim > 1:
        found.sample_largest.append(x.flatten(1).abs().amax(1).float().cpu())
    axes = {axis % x.ndim for axis in found.axes} if x.ndim > 1 else set()
    # A weight has the channels of its scales, or else those of axis 0. Several tensors that share a quantizer have no
    # channels in common.
    for axis in axes if not quantizer.weight else {quantizer.scheme.axis or 0}:
        if 0 <= axis < x.ndim and x.ndim > 1 and axis not in found.ragged and len(found.places) == 1:
            _add_channels(found, axis, x, error)


def _add_channels(found: TensorStatistics, axis: int, x: Tensor, error: Tensor) -> None:
    others = [other for other in range(x.ndim) if other != axis]
    largest = x.abs().amax(others).cpu()
    known = found.channel_largest.get(axis)
    if known is not None and len(known) != len(largest):  # an axis of any size, such as tokens
        for kept in (found.channel_largest, found.channel_signal, found.channel_noise):
            del kept[axis]
        found.ragged.add(axis)
        return
    signal, noise = (t.double().square().sum(others).cpu() for t in (x, error))
    found.channel_largest[axis] = largest if known is None else torch.maximum(known, largest)
    found.channel_signal[axis] = signal + (0 if known is None else found.channel_signal[axis])
    found.channel_noise[axis] = noise + (0 if known is None else found.channel_noise[axis])
