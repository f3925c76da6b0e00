"""Give quantizers other bits for a while, with ranges that fit them."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import HalfevenWarning
from halfeven.layerwise.calibrate import calibrate
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import PlannedTensor, PlannedWeight
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.own_class import OwnClass
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.quantization.scheme import Scheme


@dataclass(frozen=True)
class GridRange:
    """A quantizer's grid with its range, and the weight that was quantized with both, if it is kept."""

    scheme: Scheme
    state: Mapping[str, Tensor]
    cached: Tensor | None = None


def planned_quantizers(qmodel: nn.Module) -> list[tuple[Quantizer, PlannedTensor | PlannedWeight]]:
    """Return each quantizer of a model with its entry in the plan, activations first, in the plan's order."""
    named = {quantizer.name: quantizer for quantizer in quantizers(qmodel).values()}
    plan = plan_of(qmodel)
    entries: list[PlannedTensor | PlannedWeight] = [*plan.tensors, *plan.weights]
    return [(named[entry.quantizer_name], entry) for entry in entries if entry.quantizer_name in named]


def grid_range(quantizer: Quantizer) -> GridRange:
    """Return a copy of a quantizer's grid and range."""
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    return GridRange(quantizer.scheme, state, quantizer.cached)


def set_grid_range(quantizer: Quantizer, given: GridRange) -> None:
    """Give a quantizer a grid and a range, in place."""
    quantizer.scheme = given.scheme
    for name, value in given.state.items():
        stored = getattr(quantizer, name)
        if stored.shape != value.shape:  # a scale for each channel in the place of a single one
            stored.data = torch.empty_like(value)
    quantizer.load_state_dict(dict(given.state))
    # The weight that `weights_quantized_once` keeps was quantized with the grid it goes with.
    quantizer.cached = given.cached


@torch.no_grad()
def ranges_at(qmodel: nn.Module, batches: Sequence[Any], bits: int) -> dict[Quantizer, GridRange]:
    """Return the grids, and ranges from data, that the quantizers with fewer bits would have with these bits.

    The model itself stays as it is. Weights whose rounding was learned are left out: their float values are gone.

    Args:
        qmodel: a calibrated model.
        batches: calibration batches, as `halfeven.calibrate` takes them.
        bits: the bits, more than the present ones.
    """
    lower = [(q, p) for q, p in planned_quantizers(qmodel) if q.scheme.bits < bits and not (q.weight and q.state.fixed)]
    if not lower:
        return {}
    # Of all quantizers, since the calibration below sets the ranges of those with enough bits anew too.
    before = {quantizer: grid_range(quantizer) for quantizer in quantizers(qmodel).values()}
    raised: list[Quantizer] = []
    try:
        for quantizer, planned in lower:
            quantizer.scheme = dataclasses.replace(quantizer.scheme, bits=bits)
            if isinstance(planned, PlannedTensor) and planned.fixed_range is not None:
                quantizer.fix_range(planned.fixed_range)  # calibration leaves it as it is
            raised.append(quantizer)
        with warnings.catch_warnings(), _observed_without_classes(qmodel):
            warnings.simplefilter("ignore", HalfevenWarning)  # the model's own calibration has warned
            calibrate(qmodel, batches)
        return {quantizer: grid_range(quantizer) for quantizer in raised}
    finally:
        for quantizer, given in before.items():
            set_grid_range(quantizer, given)


@contextmanager
def _observed_without_classes(qmodel: nn.Module) -> Iterator[None]:
    """Observe by "mse", within the context, where an observer is a user's class that a file of the model lacks."""
    names = {q: q.observer_name for q in quantizers(qmodel).values()}
    lacking = [q for q, name in names.items() if isinstance(name, OwnClass) and name.implementation is None]
    try:
        for quantizer in lacking:
            quantizer.observer_name = "mse"
        yield
    finally:
        for quantizer in lacking:
            quantizer.observer_name = names[quantizer]


@contextmanager
def raising_bits(members: Iterable[Quantizer], ranges: Mapping[Quantizer, GridRange]) -> Iterator[None]:
    """Give quantizers the ranges of more bits within the context; those that have none there pass floats."""
    before = [(quantizer, quantizer.mode, grid_range(quantizer)) for quantizer in members]
    try:
        for quantizer, _, _ in before:
            if quantizer in ranges:
                set_grid_range(quantizer, ranges[quantizer])
            else:
                quantizer.mode = Mode.FLOAT
        yield
    finally:
        for quantizer, mode, given in before:
            quantizer.mode = mode
            set_grid_range(quantizer, given)


@contextmanager
def quantized_alone(qmodel: nn.Module) -> Iterator[None]:
    """Switch all quantizers off within the context, for single ones to be switched on by `switched_on`."""
    modes = {quantizer: quantizer.mode for quantizer in quantizers(qmodel).values()}
    try:
        for quantizer in modes:
            quantizer.mode = Mode.FLOAT
        yield
    finally:
        for quantizer, mode in modes.items():
            quantizer.mode = mode


@contextmanager
def switched_on(members: Iterable[Quantizer]) -> Iterator[None]:
    """Switch quantizers on within the context."""
    before = [(quantizer, quantizer.mode) for quantizer in members]
    try:
        for quantizer, _ in before:
            quantizer.mode = Mode.QUANTIZE
        yield
    finally:
        for quantizer, mode in before:
            quantizer.mode = mode
