"""Measure how much of the damage of quantization each tensor does, without labels.

In context, all quantizers are on, and one tensor at a time gets more bits, or float: its share of the damage is the
gain of the answers. Alone, all quantizers are off except one. The damage is the divergence of the answers. Most tools
take the squared error: in a MobileNetV2 with 4 bits, 8 tensors raised by the divergence alone are worth more than 17 by
the error (`benchmarks/sensitivity.py`).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.diagnosis.divergence import comparable, divergence
from halfeven.diagnosis.exchanged_ranges import (
    GridRange,
    planned_quantizers,
    quantized_alone,
    raising_bits,
    ranges_at,
    switched_on,
)
from halfeven.diagnosis.restarted import Stop, float_tensors, forward_of
from halfeven.errors import AlgorithmError, CalibrationError, HalfevenError, last_line
from halfeven.evaluation import evaluating
from halfeven.graph.batches import Inputs, tensors_of
from halfeven.graph.wrappers import unwrapped
from halfeven.layerwise.batches import on_device, read_inputs
from halfeven.layerwise.float_equivalence import float_function
from halfeven.layerwise.outputs import first_samples
from halfeven.layerwise.sqnr import decibels
from halfeven.options import PositiveInt
from halfeven.quantization.model_quantizers import weights_quantized_once
from halfeven.quantization.quantizer import Quantizer

RANKING_SAMPLES = 256
"""Samples that are enough to rank tensors."""

SCREENING_SAMPLES = 64
"""Samples that are enough to tell which tensors may be a cause: a diagnosis measures those on all samples."""

MEASURED_AGAIN = 12
"""Tensors that are measured on all samples where a part was taken to rank them."""

Name = TypeVar("Name", bound=Hashable)
Group = Sequence[Quantizer]
Change = Callable[[Group], AbstractContextManager[None]]
"""Changes the quantizers of a group within a context."""


Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
"""Distance of a batch's outputs from the float model's: of (found, expected)."""


@dataclass(frozen=True)
class Reference:
    """Batches, and what the float model answers to them."""

    inputs: Sequence[Inputs]
    outputs: Sequence[Sequence[Tensor]]
    """The float model's outputs, batch by batch."""

    @property
    def counts(self) -> list[int]:
        """Return the number of samples of each batch."""
        return [_sample_count(*batch) for batch in zip(self.inputs, self.outputs, strict=True)]

    @property
    def weights(self) -> list[float]:
        """Return the share of all samples that each batch has."""
        counts = self.counts
        return [count / sum(counts) for count in counts]

    def first(self, samples: int) -> "Reference":
        """Return the first batches that have so many samples together; itself where these are all."""
        seen = 0
        for count, batch in enumerate(self.counts, 1):
            seen += batch
            if seen >= samples and count < len(self.outputs):
                return Reference(self.inputs[:count], self.outputs[:count])
        return self


def _sample_count(inputs: Inputs, outputs: Sequence[Tensor]) -> int:
    """Return the number of samples: the largest first size that inputs and outputs share; anchors have another."""
    given = {len(x) for x in tensors_of(inputs) if x.ndim}
    made = {len(x) for x in outputs if x.ndim}
    return max(given & made or made, default=1)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The share of one quantized tensor, or of one group of them, in the damage to the answers.

    Divergences are those of `halfeven.diagnosis.divergence.divergence`.
    """

    name: str
    """The activation's name in the plan, or the layer's; the group's name, where groups were given."""
    weight: bool
    """True for the weight of the layer `name`."""
    bits: int
    """Bits that it has; of a group, the fewest."""
    raised_bits: int | None
    """Bits that it was given for the measurement; None: float."""
    kl_in_context: float
    """The divergence of the model minus the divergence with this tensor alone raised."""
    kl_alone: float | None
    """The divergence where it alone is quantized; None where this was not measured."""
    sqnr_alone: float | None = None
    """SQNR of the outputs in dB where it alone is quantized; None where this was not measured."""


@dataclass(frozen=True)
class Sensitivities:
    """The measurements of `sensitivities`."""

    divergence: float
    """Divergence of the whole quantized model from the float model."""
    tensors: tuple[Sensitivity, ...]
    """The most harmful first, by `kl_in_context`."""


def reference_of(
    qmodel: nn.Module, batches: Iterable[Any], *, float_model: nn.Module | None = None, samples: int = RANKING_SAMPLES
) -> Reference:
    """Return the first samples of batches, with the float answers to them.

    Args:
        qmodel: a model from `prepare`, whose example says which entries of a batch are inputs.
        batches: as `halfeven.calibrate` takes them.
        float_model: gives the answers; None: `qmodel` with its quantizers off.
        samples: number of samples; whole batches are taken.

    Raises:
        CalibrationError: there is no batch, a batch does not fit the example, or no output is floating-point.
    """
    inputs = [on_device(qmodel, given) for given in read_inputs(qmodel, first_samples(batches, samples))]
    if not inputs:
        raise CalibrationError(
            "There is no batch, so the quantized model cannot be compared with the float model. Give at least one "
            "batch of inputs; an iterator that was used up before looks empty."
        )
    with torch.no_grad(), float_function(qmodel) if float_model is None else evaluating(float_model):
        model = float_model or qmodel
        outputs = [_float_answers(model, given) for given in inputs]
    if not all(outputs):
        raise CalibrationError(
            "The model returns no tensor of floating-point numbers, so the quantized answers cannot be compared "
            "with the float ones. Let it return its scores, and take the argmax of them outside."
        )
    if not any(bool(x.isfinite().any()) for batch in outputs for x in batch):
        raise CalibrationError(
            "All answers of the float model are NaN or infinite, so there is nothing to compare the quantized answers "
            "with. Look for weights or inputs that are not finite."
        )
    return Reference(inputs, outputs)


def _float_answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the floating-point outputs of the float model.

    Raises:
        CalibrationError: the model cannot be run on these inputs.
    """
    args, kwargs = inputs
    try:
        return float_tensors(model(*args, **kwargs))
    except (HalfevenError, Warning):
        raise
    except Exception as error:
        raise CalibrationError(
            f"The float model, a {type(model).__name__}, cannot be run on the first batches: it ended with "
            f"{type(error).__name__}: {last_line(error)}. Give the model that the quantized model was made from, on "
            "the same device, and batches as it takes them."
        ) from error


@torch.no_grad()
def divergence_of(model: nn.Module, reference: Reference) -> float:
    """Return how far a model's answers, in eval mode, are from the float model's, mean over the samples."""
    with evaluating(model), weights_quantized_once(model):
        found = (float_tensors(model(*args, **kwargs)) for args, kwargs in reference.inputs)
        pairs = zip(reference.weights, found, reference.outputs, strict=True)
        return sum(weight * divergence(outputs, expected) for weight, outputs, expected in pairs)


@checked_arguments(AlgorithmError)
def sensitivities(
    qmodel: nn.Module,
    batches: Iterable[Any],
    *,
    float_model: nn.Module | None = None,
    groups: Mapping[str, Group] | None = None,
    raised_bits: int | None = 8,
    alone: bool = True,
    samples: PositiveInt = RANKING_SAMPLES,
    reference: Reference | None = None,
    ranked_by: int | None = None,
) -> Sensitivities:
    """Measure how much of the damage each quantized tensor does, in the context of all others and alone.

    The model runs from each tensor on with that tensor raised, once for each batch; nothing of it changes.

    Args:
        qmodel: a calibrated model.
        batches: batches without labels, or with labels, which are not looked at.
        float_model: gives the answers to compare with; None: `qmodel` with its quantizers off.
        groups: quantizers that are raised together, by name; None: each quantizer of the plan alone.
        raised_bits: bits that a tensor with fewer bits is raised to, all others to float; None: all to float.
        alone: measure each tensor alone, too, which takes about as long again.
        samples: number of samples; whole batches are taken.
        reference: the samples and float answers of an earlier `reference_of`; None: they are computed.
        ranked_by: number of samples to measure all tensors on; the most harmful are measured again on all samples.
            None: all tensors are measured on all samples.

    Raises:
        CalibrationError: there is no batch, or a range is not set.
    """
    qmodel = unwrapped(qmodel)
    chosen = first_samples(batches, samples)
    reference = reference or reference_of(qmodel, chosen, float_model=float_model, samples=samples)
    ranges: dict[Quantizer, GridRange] = {} if raised_bits is None else ranges_at(qmodel, chosen, raised_bits)
    members = _quantizer_groups(qmodel, groups)
    part = reference if ranked_by is None else reference.first(ranked_by)
    harm = _measure_harm(qmodel, part, members, ranges)
    if part is not reference:
        # The rank of the harmless does not matter, so only the worst are measured on all samples.
        worst = sorted(harm, key=lambda name: -harm[name])[:MEASURED_AGAIN]
        harm |= _measure_harm(qmodel, reference, {name: members[name] for name in worst}, ranges)
    lone: dict[tuple[str, bool], list[float]] = {}
    if alone:
        with quantized_alone(qmodel):
            lone = measure_changes(qmodel, part, members, switched_on, (divergence, relative_noise))
    found = [
        Sensitivity(
            name=name[0],
            weight=name[1],
            bits=min(quantizer.scheme.bits for quantizer in group),
            raised_bits=raised_bits if all(quantizer in ranges for quantizer in group) else None,
            kl_in_context=harm[name],
            kl_alone=lone[name][0] if alone else None,
            sqnr_alone=decibels(lone[name][1]) if alone else None,
        )
        for name, group in members.items()
    ]
    found.sort(key=lambda tensor: -tensor.kl_in_context)
    return Sensitivities(divergence_of(qmodel, reference), tuple(found))


def _measure_harm(
    qmodel: nn.Module, reference: Reference, members: Mapping[Name, Group], ranges: Mapping[Quantizer, GridRange]
) -> dict[Name, float]:
    """Return the fall of the divergence where each group alone is raised."""
    whole = divergence_of(qmodel, reference)
    after = divergences(qmodel, reference, members, lambda group: raising_bits(group, ranges))
    return {name: whole - left for name, left in after.items()}


def divergences(
    qmodel: nn.Module,
    reference: Reference,
    groups: Mapping[Name, Group],
    change: Change,
    measure: Measure = divergence,
) -> dict[Name, float]:
    """Return the divergence of a model's answers with each group of its quantizers changed in turn.

    Args:
        qmodel: the model, in any modes of its quantizers.
        reference: batches and the float answers.
        groups: quantizers by name.
        change: changes a group within a context.
        measure: gives the distance of a batch's outputs from the float model's.
    """
    return {name: found for name, (found,) in measure_changes(qmodel, reference, groups, change, (measure,)).items()}


@torch.no_grad()
def measure_changes(
    qmodel: nn.Module,
    reference: Reference,
    groups: Mapping[Name, Group],
    change: Change,
    measures: Sequence[Measure],
) -> dict[Name, list[float]]:
    """Return the measures of a model with each group of its quantizers changed in turn.

    The arguments are those of `divergences`; a result is the mean over the samples.
    """
    forward = forward_of(qmodel)
    # In the order of the graph: the forward pass stops before each group in turn, and each change costs the rest alone.
    order = sorted(((forward.first_use(group), name) for name, group in groups.items()), key=lambda row: row[0])
    found = {name: [0.0] * len(measures) for name in groups}
    with evaluating(qmodel), weights_quantized_once(qmodel):
        for weight, inputs, expected in zip(reference.weights, reference.inputs, reference.outputs, strict=True):
            stop: Stop = forward.start(inputs)
            # Invariant: `stop` is the unchanged forward pass before `position`; each change runs the rest on a copy.
            for position, name in order:
                forward.advance(stop, position)
                with change(groups[name]):
                    outputs = forward.outputs(stop)
                for number, measure in enumerate(measures):
                    found[name][number] += weight * measure(outputs, expected)
    return found


def relative_noise(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the squared difference of all outputs from the float model's, over their squares."""
    pairs = [comparable(f, e) for f, e in zip(found, expected, strict=True)]
    noise = sum(float((f - e).double().square().sum()) for f, e in pairs)
    signal = sum(float(e.double().square().sum()) for _, e in pairs)
    if not math.isfinite(noise):
        return float("inf")
    return noise / signal if signal else float(noise > 0)


def _quantizer_groups(qmodel: nn.Module, groups: Mapping[str, Group] | None) -> dict[tuple[str, bool], Group]:
    """Return the groups to change, by (name, True for a layer's weight)."""
    if groups is not None:
        found: dict[tuple[str, bool], Group] = {(name, False): group for name, group in groups.items()}
    else:
        found = {(planned.name, quantizer.weight): [quantizer] for quantizer, planned in planned_quantizers(qmodel)}
    return {name: group for name, group in found.items() if any(map(_can_change, group))}


def _can_change(quantizer: Quantizer) -> bool:
    """Return False for a weight whose rounding was learned: there is no float value to raise it to."""
    return not (quantizer.weight and quantizer.state.fixed)
