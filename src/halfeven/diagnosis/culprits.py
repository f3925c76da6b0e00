"""Find what ruins a quantized model: the tensor, or group of operators, that brings the answers back when raised."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from halfeven.diagnosis.causes import FRONT_END, Cause, Suspect, cause_of, shared_cause_of
from halfeven.diagnosis.diagnosis import Finding
from halfeven.diagnosis.exchanged_ranges import planned_quantizers, raising_bits
from halfeven.diagnosis.operator_groups import OperatorGroup, float_rules, integer_operators, operator_groups
from halfeven.diagnosis.patient import (
    Patient,
    activations_read_by,
    make_finding,
    planned_entry,
    recovered_share,
    suspect_of,
    try_remedies,
    worst_fit,
)
from halfeven.diagnosis.remedies import remedies
from halfeven.diagnosis.sensitivity import SCREENING_SAMPLES, Sensitivity, divergence_of, divergences
from halfeven.diagnosis.spread_damage import finding_of_many
from halfeven.diagnosis.trials import RECALIBRATE, Remedy, Trial, remedy_by_rules, try_remedy
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import PlannedTensor, PlannedWeight

OUTSTANDING_SHARE = 0.4
"""Share of the damage that a single tensor, or a group, takes away where it is called a cause."""
SUFFICIENT_SHARE = 0.75
"""Share of the largest group's effect that a smaller group must have, and of the best remedy's that an estimator must
have to be the cause."""


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
    if (layer := _layer_at_fault(patient)) is not None:
        return layer
    group = _best_group(patient)
    return _finding_of_group(patient, group) if group is not None else finding_of_many(patient, first=first)


def _calibrated_again(patient: Patient) -> tuple[Finding, nn.Module] | None:
    """Return the finding that ranges do not fit the batches; None where calibrating again does not help."""
    trial, repaired = try_remedy(patient.qmodel, RECALIBRATE, patient.batches, patient.reference)
    if trial.failed or trial.divergence > (1 - OUTSTANDING_SHARE) * patient.divergence:
        return None
    where, evidence = worst_fit(patient)
    cause = Cause(
        "the ranges do not fit these batches",
        f"{evidence} The model was calibrated with other data, or its weights or ranges have changed since.",
    )
    return make_finding(patient, cause, where, trial, [trial]), repaired


def _finding_of_tensor(patient: Patient, tensor: Sensitivity) -> tuple[Finding, nn.Module]:
    planned = planned_entry(patient, tensor)
    suspect = suspect_of(patient, planned)
    chosen, trials, repaired = try_remedies(patient, _remedies_of(suspect))
    # What helped is part of the evidence, so the cause is named after the trials.
    suspect = dataclasses.replace(suspect, observer_helps=_helping_observer(patient, trials))
    cause = cause_of(suspect)
    if cause.name == FRONT_END:
        # The other layers of a front end have no finding of their own: all of it in float is tried too.
        leading = _leading_in_float(patient, planned)
        whole, model = try_remedy(patient.qmodel, leading, patient.batches, patient.reference)
        trials.append(whole)
        if whole.divergence < chosen.divergence / 2:  # its other layers lose, too
            chosen, repaired = whole, model
    return make_finding(patient, cause, suspect.tensor, chosen, trials), repaired


def _remedies_of(suspect: Suspect) -> list[Remedy]:
    spread = suspect.found.channel_spread()
    return remedies(suspect.qmodel, suspect.planned, spread[1] if spread else 1.0, suspect.input_channel_spread)


def _helping_observer(patient: Patient, trials: Sequence[Trial]) -> str:
    """Return the estimator that alone takes away most of what the best remedy does; "" if none does."""
    gains = {trial.remedy: recovered_share(patient, trial) or 0.0 for trial in trials}
    named = {remedy: remedy.rules[0].observer for remedy in gains if remedy.rules and remedy.rules[0].observer}
    best = max(named, key=lambda remedy: gains[remedy], default=None)
    helps = best is not None and gains[best] >= max(OUTSTANDING_SHARE, SUFFICIENT_SHARE * max(gains.values()))
    return str(named[best]) if best is not None and helps else ""


def _layer_at_fault(patient: Patient) -> tuple[Finding, nn.Module] | None:
    """Return the finding of a layer whose weight and input do the damage together; None if there is none.

    An outlier channel, for example, spoils the input of a layer and, where small weights make up for it, the weight.
    """
    # A layer has its own name, and its output may have it too: the flag tells a weight from an activation.
    named = {(planned.name, q.weight): q for q, planned in planned_quantizers(patient.qmodel)}
    layers = {
        weight.name: [named[weight.name, True], *(named[name, False] for name in reads)]
        for weight in plan_of(patient.qmodel).weights
        if (weight.name, True) in named
        and (reads := [t.name for t in activations_read_by(patient, weight.name) if (t.name, False) in named])
    }
    # Each layer's weight and the activations that it reads, raised together.
    part = patient.reference.first(SCREENING_SAMPLES)
    whole = divergence_of(patient.qmodel, part)
    # Raised to float: `raising_bits` without ranges switches the members off.
    left = divergences(patient.qmodel, part, layers, lambda group: raising_bits(group, {}))
    worst = min(left, key=lambda name: left[name], default=None)
    if worst is None or left[worst] > (1 - OUTSTANDING_SHARE) * whole:
        return None
    weight = next(weight for weight in plan_of(patient.qmodel).weights if weight.name == worst)
    entries: list[PlannedTensor | PlannedWeight] = [*activations_read_by(patient, worst), weight]
    suspects = [suspect_of(patient, entry) for entry in entries]
    cause = shared_cause_of(suspects)
    if cause is None:
        return None
    # By what they would paste, since the suspects share remedies of the whole model.
    given = {remedy.paste: remedy for suspect in suspects for remedy in _remedies_of(suspect)}
    chosen, trials, repaired = try_remedies(patient, list(given.values()))
    where = " and ".join(suspect.tensor for suspect in suspects)
    found = make_finding(patient, cause, where, chosen, trials)
    return (found, repaired) if (found.recovered or 0.0) >= OUTSTANDING_SHARE else None


def _leading_in_float(patient: Patient, planned: PlannedTensor | PlannedWeight) -> Remedy:
    """Return the remedy that leaves all operators in float up to the last that reads a tensor."""
    operators = integer_operators(patient.qmodel)
    readers = {planned.name} if isinstance(planned, PlannedWeight) else set(planned.consumers)
    last = max(number for number, name in enumerate(operators) if name in readers)
    return remedy_by_rules("the front end in float", float_rules(operators[: last + 1], operators))


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
    # Of the groups that take nearly as much away, the fewest operators in float are the finding.
    best = min(good, key=lambda group: len(group.operators), default=None)
    # A group that takes away no more than its share of the operators is no cause.
    total = len(patient.sensitivities.tensors)
    return best if best is not None and gains[best] > 2 * len(best.quantizers) / total else None


def _finding_of_group(patient: Patient, group: OperatorGroup) -> tuple[Finding, nn.Module]:
    entries = [entry for q, entry in planned_quantizers(patient.qmodel) if q in group.quantizers]
    cause = shared_cause_of([suspect_of(patient, entry) for entry in entries])
    if cause is None or group.leading:
        name = FRONT_END if group.leading else "layers that lose together"
        told = f"No single tensor takes away {OUTSTANDING_SHARE:.0%} of the damage, these {len(group.operators)} "
        cause = Cause(name, f"{told}operators together do.")
    chosen, trials, repaired = try_remedies(patient, [remedy_by_rules("these layers in float", group.rules)])
    where = ", ".join(group.operators[:4]) + (" and more" if len(group.operators) > 4 else "")
    return make_finding(patient, cause, where, chosen, trials), repaired
