"""Empirical bias correction: the mean shift that quantization gives each output channel is taken from the bias.

White paper, section 3.3: E[W x] - E[W^ x^] per output channel, measured layer by layer on the quantized and already
corrected layers before; it costs nothing at run time. Without data see `halfeven.ptq.gaussian`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.evaluation import evaluating
from halfeven.graph.operators import OperatorKind, kind_of, module_of
from halfeven.placement.changes import give_bias
from halfeven.placement.planning import qualified, regions
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.streams import Cache, Stream, in_float, rebatched, streams
from halfeven.ptq.units import Unit, units


def channel_means(x: Tensor, axis: int) -> Tensor:
    """Mean over all axes but one, [channels], in float64: the sums are long and their difference is small."""
    return x.detach().movedim(axis, 0).flatten(1).double().mean(1)


@dataclass(frozen=True)
class BiasCorrectionReport:
    """The shift that was taken from each layer's bias."""

    shifts: dict[str, float]
    """Root mean square over the channels of a layer, over that of the float outputs' means about zero."""

    def __str__(self) -> str:
        if not self.shifts:
            return "Bias correction: no layer to correct."
        name = max(self.shifts, key=lambda key: self.shifts[key])
        return (
            f"Bias correction of {len(self.shifts)} layers; the largest shift, in {name}, is "
            f"{100 * self.shifts[name]:.1f} % of its outputs' means."
        )


@torch.no_grad()
def correct_biases(
    qmodel: nn.Module, loader: Iterable[Any], *, options: PTQOptions | None = None, batches: int | None = None
) -> BiasCorrectionReport:
    """Correct the bias of every layer with a quantized weight; a layer without one is given it.

    All ranges must be set; those of activations should be set again afterwards.

    Args:
        qmodel: a calibrated model; it is changed in place.
        loader: batches as for `calibrate`; 500 to 1,000 samples suffice.
        options: batch size and memory bound.
        batches: how many of the loader's batches to take; None: all.

    Raises:
        CalibrationError: the loader gave nothing, or a range is not set.
    """
    options = options or PTQOptions()
    inputs = rebatched(loader, options.batch_size, batches)
    cache = Cache(options.memory * 1e9, options.cache_folder)
    shifts: dict[str, float] = {}
    with evaluating(qmodel):
        for prefix, region in regions(qmodel).items():
            floats, quantized = streams(qmodel, prefix, inputs, cache)
            parts = units(region, "layers")
            for index, unit in enumerate(parts):
                if unit.layers:
                    shifts[qualified(prefix, unit.name)] = _correct(qmodel, prefix, unit, floats, quantized)
                quantized.advance(unit)
                for stream in (floats, quantized):
                    stream.forget(parts[: index + 1])
    return BiasCorrectionReport(shifts)


def _correct(qmodel: nn.Module, prefix: str, unit: Unit, floats: Stream, quantized: Stream) -> float:
    """Correct the layer of a unit; the float stream goes on, the quantized one stays before the unit."""
    (node,) = unit.layers
    layer: Any = module_of(node)
    axis = -1 if kind_of(node) is OperatorKind.LINEAR else 1
    with in_float(unit):
        wanted = _Means(layer, axis)
        floats.advance(unit, wanted)
    found = _Means(layer, axis)
    quantized.visit(unit, found)
    shift = wanted.mean - found.mean
    give_bias(qmodel, qualified(prefix, str(node.target)))
    layer.bias.add_(shift.to(layer.bias))
    return float(shift.norm() / wanted.mean.norm().clamp(min=1e-12))


class _Means:
    """Runs the modules of a unit, and takes the mean of what one of them gives, channel by channel."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        self.layer, self.axis = layer, axis
        self.total: Tensor | float = 0.0
        self.samples = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        result = module(*args)
        if module is self.layer:
            self.total = self.total + channel_means(result, self.axis) * result.shape[0]
            self.samples += result.shape[0]
        return result

    @property
    def mean(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        return self.total / self.samples
