"""Empirical bias correction: the mean shift that quantization gives each output channel is taken from the bias.

White paper, section 3.3: E[W x] - E[W^ x^] per output channel, measured layer by layer on the quantized and already
corrected layers before; it costs nothing at run time. Without data see `halfeven.ptq.data_free.calibrate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.evaluation import evaluating
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import kind_of, module_of
from halfeven.layerwise.activations import Stream, check_float_weights, in_float, streams
from halfeven.layerwise.blocks import Unit, units
from halfeven.layerwise.cache import Cache, store_inputs
from halfeven.placement.graph_edits import give_bias
from halfeven.placement.make_plan import qualified, regions
from halfeven.ptq.options import PTQOptions


def channel_means(x: Tensor, axis: int) -> Tensor:
    """Mean over all axes but one, [channels], in float64: the sums are long and their difference is small."""
    return x.detach().movedim(axis, 0).flatten(1).double().mean(1)


@dataclass(frozen=True)
class BiasCorrectionReport:
    """The shift that was taken from each layer's bias."""

    shifts: dict[str, float]
    """Root mean square over the channels of a layer, over that of its float outputs."""

    def __str__(self) -> str:
        if not self.shifts:
            return "Bias correction: no layer to correct."
        name = max(self.shifts, key=lambda key: self.shifts[key])
        return (
            f"Bias correction of {len(self.shifts)} layers; the largest shift, in {name}, is "
            f"{100 * self.shifts[name]:.1f} % of its outputs' root mean square."
        )


@torch.no_grad()
def correct_biases(
    qmodel: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    options: PTQOptions | None = None,
    batches: int | None = None,
) -> BiasCorrectionReport:
    """Correct the bias of every layer with a quantized weight; a layer without one is given it.

    All ranges must be set; those of activations should be set again afterwards.

    Args:
        qmodel: a calibrated model; it is changed in place.
        loader: batches as for `calibrate`; 500 to 1,000 samples suffice.
        reference: a copy of `qmodel` with the float weights, for a model whose rounding was learned and which has
            only rounded ones; None: `qmodel` itself.
        options: batch size and memory bound.
        batches: how many of the loader's batches to take; None: all.

    Raises:
        AlgorithmError: the rounding was learned, and there is no `reference`.
        CalibrationError: the loader gave nothing, or a range is not set.
    """
    options = options or PTQOptions()
    if reference is None:
        check_float_weights(qmodel, "Bias correction")
    cache = Cache(options.memory * 1e9, options.cache_folder)
    inputs = store_inputs(loader, options.batch_size, cache, batches)
    shifts: dict[str, float] = {}
    exact = qmodel if reference is None else reference
    with evaluating(qmodel), evaluating(exact):
        for prefix, region in regions(qmodel).items():
            floats, _ = streams(exact, prefix, inputs, cache)
            _, quantized = streams(qmodel, prefix, inputs, cache)
            pairs = list(zip(units(regions(exact)[prefix], "layers"), units(region, "layers"), strict=True))
            for index, (wanted, unit) in enumerate(pairs):
                if unit.layers:
                    exact_means = _float_means(wanted, floats)
                    shifts[qualified(prefix, unit.name)] = _correct(qmodel, prefix, unit, exact_means, quantized)
                else:
                    with in_float(wanted):
                        floats.advance(wanted)
                quantized.advance(unit)
                floats.forget(pair[0] for pair in pairs[: index + 1])
                quantized.forget(pair[1] for pair in pairs[: index + 1])
    return BiasCorrectionReport(shifts)


def _float_means(unit: Unit, floats: Stream) -> "_Means":
    """What the float layer of a unit gives in the mean; the stream goes on."""
    means = _Means(unit)
    with in_float(unit):
        floats.advance(unit, means)
    return means


def _correct(qmodel: nn.Module, prefix: str, unit: Unit, wanted: "_Means", quantized: Stream) -> float:
    """Correct the layer of a unit; the stream stays before the unit."""
    found = _Means(unit)
    quantized.visit(unit, found)
    shift = wanted.mean - found.mean
    (node,) = unit.layers
    give_bias(qmodel, qualified(prefix, str(node.target)))
    layer: Any = module_of(node)
    layer.bias.add_(shift.to(layer.bias))
    return float(shift.square().mean().sqrt() / wanted.size.clamp(min=1e-12))


class _Means:
    """Runs the modules of a unit, and takes the mean of what its layer gives, channel by channel."""

    def __init__(self, unit: Unit) -> None:
        (node,) = unit.layers
        self.layer = module_of(node)
        self.axis = -1 if kind_of(node) is OperatorKind.LINEAR else 1
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.samples = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        result = module(*args)
        if module is self.layer:
            self.total = self.total + channel_means(result, self.axis) * result.shape[0]
            self.squares = self.squares + result.double().square().mean() * result.shape[0]
            self.samples += result.shape[0]
        return result

    @property
    def mean(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        return self.total / self.samples

    @property
    def size(self) -> Tensor:
        """Root mean square of all that was given."""
        assert isinstance(self.squares, Tensor)
        return (self.squares / self.samples).sqrt()
