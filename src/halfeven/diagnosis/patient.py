"""The model under diagnosis: what was measured of it, its remedies tried on it, and a finding made of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfeven.diagnosis.causes import Cause, Suspect
from halfeven.diagnosis.diagnosis import Finding, TriedRemedy
from halfeven.diagnosis.exchanged_ranges import planned_quantizers
from halfeven.diagnosis.not_finite import first_broken_batch
from halfeven.diagnosis.sensitivity import Reference, Sensitivities, Sensitivity
from halfeven.diagnosis.statistics import TensorStatistics
from halfeven.diagnosis.trials import Remedy, Trial, try_remedy
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import PlannedTensor, PlannedWeight

Statistics = dict[tuple[str, bool], TensorStatistics]

NEARLY_AS_GOOD = 0.75
"""Share of the best remedy's effect that a cheaper remedy must have."""


@dataclass(frozen=True)
class Patient:
    """A quantized model under diagnosis, and what it is judged by."""

    qmodel: nn.Module
    batches: Sequence[Any]
    reference: Reference
    sensitivities: Sensitivities
    statistics: Statistics

    @property
    def divergence(self) -> float:
        """Return how far the model's answers are from the float model's."""
        return self.sensitivities.divergence


def planned_entry(patient: Patient, tensor: Sensitivity) -> PlannedTensor | PlannedWeight:
    return next(
        planned
        for q, planned in planned_quantizers(patient.qmodel)
        if planned.name == tensor.name and q.weight == tensor.weight
    )


def suspect_of(patient: Patient, planned: PlannedTensor | PlannedWeight) -> Suspect:
    """Return a tensor with all that was measured of it; a weight with the activation that its layer reads."""
    weight = isinstance(planned, PlannedWeight)
    found = patient.statistics[planned.name, weight]
    read = activations_read_by(patient, planned.name)[:1] if weight else []
    return Suspect(patient.qmodel, planned, found, read=suspect_of(patient, read[0]) if read else None)


def activations_read_by(patient: Patient, layer: str) -> list[PlannedTensor]:
    """Return the quantized activations that a layer reads."""
    return [tensor for tensor in plan_of(patient.qmodel).tensors if layer in tensor.consumers]


def worst_fit(patient: Patient) -> tuple[str, str]:
    """Return the tensor whose range fits its values least, and the numbers that show it."""
    fits = {(name, weight): found.range_misfit() for (name, weight), found in patient.statistics.items()}
    name, weight = max(fits, key=lambda row: fits[row])
    found = patient.statistics[name, weight]
    low, high = found.bounds
    least, largest = found.extremes
    where = f"the weight of {name}" if weight else name
    return where, (
        f"{where[0].upper()}{where[1:]} reaches from {least:.3g} to {largest:.3g}, its range from {low:.3g} to "
        f"{high:.3g}; {found.clipped_share:.1%} of the values are clipped."
    )


def try_remedies(patient: Patient, given: Sequence[Remedy]) -> tuple[Trial, list[Trial], nn.Module]:
    """Try all remedies. Returns the first that is nearly as good as the best, all trials, and the repaired model."""
    tried = [try_remedy(patient.qmodel, remedy, patient.batches, patient.reference) for remedy in given]
    # A remedy that cannot be applied has the least gain.
    gains = [-math.inf if trial.failed else patient.divergence - trial.divergence for trial, _ in tried]
    if first_broken_batch(patient.qmodel, patient.reference) is not None:
        whole = [first_broken_batch(model, patient.reference) is None for _, model in tried]
        # No remedy that leaves NaN or infinity is nearly as good as a remedy that leaves none.
        gains = [gain if kept else -math.inf for gain, kept in zip(gains, whole, strict=True)] if any(whole) else gains
    best = max(gains)
    # Remedies come cheapest first. Where none gains, the best one is still returned: its caller judges it.
    first = next(number for number, gain in enumerate(gains) if gain >= NEARLY_AS_GOOD * best or gain == best)
    return tried[first][0], [trial for trial, _ in tried], tried[first][1]


def make_finding(patient: Patient, cause: Cause, where: str, chosen: Trial, trials: Sequence[Trial]) -> Finding:
    return Finding(
        cause=cause.name,
        where=where,
        evidence=cause.evidence,
        remedy=chosen.remedy.name,
        paste=chosen.remedy.paste,
        rules=chosen.remedy.rules,
        options=dict(chosen.remedy.options),
        recovered=recovered_share(patient, chosen),
        tried=tuple(
            TriedRemedy(
                remedy=trial.remedy.name,
                recovered=recovered_share(patient, trial),
                paste=trial.remedy.paste,
                failed=trial.failed,
            )
            for trial in trials
        ),
    )


def recovered_share(patient: Patient, trial: Trial) -> float | None:
    return None if trial.failed else 1 - trial.divergence / patient.divergence
