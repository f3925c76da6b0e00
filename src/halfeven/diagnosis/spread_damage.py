"""Find what helps where no part of a model stands out: remedies of the whole model, and its worst tensors raised."""

import dataclasses
import glob

from torch import nn

from halfeven.diagnosis.causes import UNLIKE_RANGE_RATIO, Cause, shared_cause_of
from halfeven.diagnosis.diagnosis import Finding
from halfeven.diagnosis.exchanged_ranges import planned_quantizers
from halfeven.diagnosis.patient import Patient, make_finding, planned_entry, suspect_of, try_remedies, worst_fit
from halfeven.diagnosis.remedies import equalization, estimators_everywhere, float_remedies, remedies
from halfeven.diagnosis.trials import LEARN_ROUNDING, PER_CHANNEL, Remedy, remedy_by_rules
from halfeven.placement.options import Rule
from halfeven.placement.plan import PlannedTensor, PlannedWeight


def finding_of_many(patient: Patient, *, first: bool) -> tuple[Finding, nn.Module] | None:
    """Return the finding where the damage is spread: the remedies of the whole model, and its worst tensors raised."""
    # `try_remedies` prefers what comes first: changes of the whole model before single tensors with more bits.
    given: list[Remedy] = [equalization(patient.qmodel)] if first else []
    if first and any(q.weight and q.scheme.axis is None for q, _ in planned_quantizers(patient.qmodel)):
        given.insert(0, PER_CHANNEL)
    if first and any(q.weight and q.scheme.bits < 8 for q, _ in planned_quantizers(patient.qmodel)):
        given.append(LEARN_ROUNDING)
    given += estimators_everywhere(patient.qmodel) if first else []
    given += [remedy for count in (2, 4, 8, 16) if (remedy := _raise_worst(patient, count)) is not None]
    if not given:
        return None
    chosen, trials, repaired = try_remedies(patient, given)
    cause, where = _cause_of_many(patient, chosen.remedy)
    finding = make_finding(patient, cause, where, chosen, trials)
    return dataclasses.replace(finding, further=_search_call(chosen.remedy)), repaired


def _cause_of_many(patient: Patient, remedy: Remedy) -> tuple[Cause, str]:
    """Return the cause of a damage that is spread, and where it is seen best, by the remedy that helps."""
    changed = dict(remedy.options)
    if "activation_observer" in changed or any(rule.observer for rule in remedy.rules):
        where, evidence = worst_fit(patient)
        return Cause("the ranges are badly estimated", f"{evidence} The same holds for other tensors."), where
    if changed.get("equalize") == "on" or changed.get("per_channel"):
        unlike = [(row, name, weight) for (name, weight), row in _channel_outliers(patient).items()]
        if unlike:
            (channel, ratio), name, weight = max(unlike, key=lambda entry: entry[0][1])
            where = f"the weight of {name}" if weight else name
            count = f" {len(unlike)} tensors have such channels." if len(unlike) > 1 else ""
            evidence = f"Channel {channel} of {where} has {ratio:.3g} times the range of the median channel.{count}"
            return Cause("badly scaled channels share one scale", evidence), where
    raised = {rule.pattern for rule in remedy.rules}
    entries = [entry for _, entry in planned_quantizers(patient.qmodel) if raised & _names_of(entry)]
    cause = shared_cause_of([suspect_of(patient, entry) for entry in entries])
    if cause is not None:
        return cause, " and ".join(sorted(raised)[:3]) + (" and more" if len(raised) > 3 else "")
    worst = patient.sensitivities.tensors[0]
    share = worst.kl_in_context / patient.divergence
    cause = Cause("the damage is spread over many tensors", f"The worst takes away {share:.0%} where it is raised.")
    return cause, f"{worst.name} and {len(patient.statistics) - 1} others"


def _names_of(entry: PlannedTensor | PlannedWeight) -> set[str]:
    """Return the names by which rules leave a tensor in float or give it bits."""
    names = {entry.name} if isinstance(entry, PlannedWeight) else {*entry.places, *entry.consumers}
    return {glob.escape(name) for name in names}


def _channel_outliers(patient: Patient) -> dict[tuple[str, bool], tuple[int, float]]:
    """Return channel and ratio to the median channel of each tensor with one scale in which channels are unlike."""
    found = {}
    for name, row in patient.statistics.items():
        outlier = row.channel_outlier()
        if row.quantizer.scheme.axis is None and outlier is not None and outlier[2] >= UNLIKE_RANGE_RATIO:
            found[name] = outlier[1:]
    return found


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
        planned = planned_entry(patient, tensor)
        raising = [r for r in remedies(patient.qmodel, planned, 1.0) if r.name == "8 bits"]
        for rule in (raising or float_remedies(patient.qmodel, planned))[0].rules:
            rules[rule] = None
    return remedy_by_rules(f"the {count} worst tensors raised", list(rules))
