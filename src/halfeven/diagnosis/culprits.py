"""Find what ruins a quantized model: the tensor, or group of operators, that brings the answers back when raised."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfeven.diagnosis.causes import FRONT_END, Cause, Suspect, cause_of
from halfeven.diagnosis.diagnosis import Finding, TriedRemedy
from halfeven.diagnosis.exchanged_ranges import planned_quantizers, raising_bits
from halfeven.diagnosis.operator_groups import OperatorGroup, float_rules, integer_operators, operator_groups
from halfeven.diagnosis.remedies import equalization, float_remedies, remedies
from halfeven.diagnosis.sensitivity import (
    SCREENING_SAMPLES,
    Reference,
    Sensitivities,
    Sensitivity,
    divergence_of,
    divergences,
)
from halfeven.diagnosis.statistics import TensorStatistics
from halfeven.diagnosis.trials import (
    LEARN_ROUNDING,
    PER_CHANNEL,
    RECALIBRATE,
    Remedy,
    Trial,
    remedy_by_rules,
    try_remedy,
)
from halfeven.placement.options import Rule
from halfeven.placement.plan import PlannedTensor, PlannedWeight

Statistics = dict[tuple[str, bool], TensorStatistics]

OUTSTANDING_SHARE = 0.4
"""Share of the damage that a single tensor, or a group, takes away where it is called a cause."""
SUFFICIENT_SHARE = 0.75
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


def find_culprit(patient: Patient, *, first: bool) -> tuple[Finding, nn.Module] | None:
    """Return the finding about the most harmful part of a model, and the model with its remedy; None if none helps.

    Args:
        patient: the model.
        first: nothing has been mended yet; remedies of the whole model are tried then alone.
    """
    if not patient.sensitivities.tensors or patient.divergence <= 0:
        return None
    # The cheapest question first: do the ranges belong to these batches at all?
    if first and (again := _calibrated_again(patient)) is not None:
        return again
    # Then the worst tensor alone, then neighbours together, then the whole model: from a narrow remedy to a wide one.
    single = patient.sensitivities.tensors[0]
    if single.kl_in_context >= OUTSTANDING_SHARE * patient.divergence:
        found = _finding_of_tensor(patient, single)
        if found[0].recovered is not None and found[0].recovered >= OUTSTANDING_SHARE:
            return found
    group = _best_group(patient)
    return _finding_of_group(patient, group) if group is not None else _finding_of_many(patient, first=first)


def _calibrated_again(patient: Patient) -> tuple[Finding, nn.Module] | None:
    """Return the finding that ranges do not fit the batches; None where calibrating again does not help."""
    trial, repaired = try_remedy(patient.qmodel, RECALIBRATE, patient.batches, patient.reference)
    if trial.failed or trial.divergence > (1 - OUTSTANDING_SHARE) * patient.divergence:
        return None
    shares = {name: found.clipped_share for (name, weight), found in patient.statistics.items() if not weight}
    where = max(shares, key=lambda name: shares[name], default="")
    cause = Cause(
        "the ranges do not fit these batches",
        f"{shares.get(where, 0.0):.1%} of the values of {where} are clipped: the model was calibrated with other data, "
        "or its weights have changed since.",
    )
    return _make_finding(patient, cause, where, trial, [trial]), repaired


def _finding_of_tensor(patient: Patient, tensor: Sensitivity) -> tuple[Finding, nn.Module]:
    planned = _planned_entry(patient, tensor)
    statistics = patient.statistics[tensor.name, tensor.weight]
    spread = statistics.channel_spread()
    chosen, trials, repaired = _try_remedies(patient, remedies(patient.qmodel, planned, spread[1] if spread else 1.0))
    helps = chosen.remedy.rules[0].observer if chosen.remedy.rules and chosen.remedy.rules[0].observer else ""
    suspect = Suspect(patient.qmodel, planned, statistics, str(helps))
    cause = cause_of(suspect)
    if cause.name == FRONT_END:
        leading = _leading_in_float(patient, planned)
        whole, model = try_remedy(patient.qmodel, leading, patient.batches, patient.reference)
        trials.append(whole)
        if whole.divergence < chosen.divergence / 2:  # its other layers lose, too
            chosen, repaired = whole, model
    return _make_finding(patient, cause, suspect.tensor, chosen, trials), repaired


def _leading_in_float(patient: Patient, planned: PlannedTensor | PlannedWeight) -> Remedy:
    """Return the remedy that leaves all operators in float up to the last that reads a tensor."""
    operators = integer_operators(patient.qmodel)
    readers = {planned.name} if isinstance(planned, PlannedWeight) else set(planned.consumers)
    last = max(number for number, name in enumerate(operators) if name in readers)
    return remedy_by_rules("the front end in float", float_rules(operators[: last + 1], operators))


def _planned_entry(patient: Patient, tensor: Sensitivity) -> PlannedTensor | PlannedWeight:
    return next(
        planned
        for q, planned in planned_quantizers(patient.qmodel)
        if planned.name == tensor.name and q.weight == tensor.weight
    )


def _try_remedies(patient: Patient, given: Sequence[Remedy]) -> tuple[Trial, list[Trial], nn.Module]:
    """Try all remedies. Returns the first that is nearly as good as the best, all trials, and the repaired model."""
    tried = [try_remedy(patient.qmodel, remedy, patient.batches, patient.reference) for remedy in given]
    gains = [patient.divergence - trial.divergence for trial, _ in tried]
    best = max(gains)
    first = next(number for number, gain in enumerate(gains) if gain >= SUFFICIENT_SHARE * best or gain == best)
    return tried[first][0], [trial for trial, _ in tried], tried[first][1]


def _make_finding(patient: Patient, cause: Cause, where: str, chosen: Trial, trials: Sequence[Trial]) -> Finding:
    return Finding(
        cause=cause.name,
        where=where,
        evidence=cause.evidence,
        remedy=chosen.remedy.name,
        paste=chosen.remedy.paste,
        rules=chosen.remedy.rules,
        options=dict(chosen.remedy.options),
        recovered=_recovered_share(patient, chosen),
        tried=tuple(
            TriedRemedy(
                remedy=trial.remedy.name,
                recovered=_recovered_share(patient, trial),
                paste=trial.remedy.paste,
                failed=trial.failed,
            )
            for trial in trials
        ),
    )


def _recovered_share(patient: Patient, trial: Trial) -> float | None:
    return None if trial.failed else 1 - trial.divergence / patient.divergence


def _best_group(patient: Patient) -> OperatorGroup | None:
    """Return the smallest group of neighbours that takes most of the damage away; None if none does."""
    groups = operator_groups(patient.qmodel)
    members = {group.name: group.quantizers for group in groups if group.quantizers}
    # Groups are many, and a part of the samples is enough to see which stand out.
    part = patient.reference.first(SCREENING_SAMPLES)
    whole = patient.divergence if part is patient.reference else divergence_of(patient.qmodel, part)
    found = divergences(patient.qmodel, part, members, lambda group: raising_bits(group, {}))
    gains = {group: 1 - found[group.name] / whole for group in groups if group.name in found} if whole else {}
    good = [
        group
        for group, gain in gains.items()
        if gain >= max(OUTSTANDING_SHARE, SUFFICIENT_SHARE * max(gains.values(), default=0.0))
    ]
    best = min(good, key=lambda group: len(group.operators), default=None)
    # A group that takes away no more than its share of the operators is no cause.
    total = len(patient.sensitivities.tensors)
    return best if best is not None and gains[best] > 2 * len(best.quantizers) / total else None


def _finding_of_group(patient: Patient, group: OperatorGroup) -> tuple[Finding, nn.Module]:
    cause = Cause(
        FRONT_END if group.leading else "layers that lose together",
        f"No single tensor takes away {OUTSTANDING_SHARE:.0%} of the damage, these {len(group.operators)} operators "
        "together do.",
    )
    chosen, trials, repaired = _try_remedies(patient, [remedy_by_rules("in float", group.rules)])
    where = ", ".join(group.operators[:4]) + (" and more" if len(group.operators) > 4 else "")
    return _make_finding(patient, cause, where, chosen, trials), repaired


def _finding_of_many(patient: Patient, *, first: bool) -> tuple[Finding, nn.Module] | None:
    """Return the finding where the damage is spread: the remedies of the whole model, and its worst tensors raised."""
    given: list[Remedy] = [equalization(patient.qmodel)] if first else []
    if first and any(q.weight and q.scheme.axis is None for q, _ in planned_quantizers(patient.qmodel)):
        given.insert(0, PER_CHANNEL)
    if first and any(q.weight and q.scheme.bits < 8 for q, _ in planned_quantizers(patient.qmodel)):
        given.append(LEARN_ROUNDING)
    given += [remedy for count in (2, 4, 8, 16) if (remedy := _raise_worst(patient, count)) is not None]
    if not given:
        return None
    chosen, trials, repaired = _try_remedies(patient, given)
    worst = patient.sensitivities.tensors[0]
    share = worst.kl_in_context / patient.divergence
    cause = Cause("the damage is spread over many tensors", f"The worst takes away {share:.0%} where it is raised.")
    where = f"{worst.name} and {len(patient.statistics) - 1} others"
    finding = _make_finding(patient, cause, where, chosen, trials)
    return dataclasses.replace(finding, further=_search_call(chosen.remedy)), repaired


def _search_call(remedy: Remedy) -> str:
    """Return the call that chooses the tensors to raise with care, where a remedy raises several; else ""."""
    raised = len({rule.pattern for rule in remedy.rules})
    if not raised:
        return ""
    call = f"halfeven.search(model, batches, tensors={raised})"
    return f"{call} chooses as many, each in the context of those chosen before it: docs/search.md"


def _raise_worst(patient: Patient, count: int) -> Remedy | None:
    """Return the remedy that raises the most harmful tensors: to 8 bits those with fewer, to float all others."""
    worst = [tensor for tensor in patient.sensitivities.tensors if tensor.kl_in_context > 0]
    if len(worst) < count or count > len(patient.sensitivities.tensors) / 2:
        return None
    rules: dict[Rule, None] = {}
    for tensor in worst[:count]:
        planned = _planned_entry(patient, tensor)
        raising = [r for r in remedies(patient.qmodel, planned, 1.0) if r.name == "8 bits"]
        for rule in (raising or float_remedies(patient.qmodel, planned))[0].rules:
            rules[rule] = None
    return remedy_by_rules(f"the {count} worst tensors raised", list(rules))
