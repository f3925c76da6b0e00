"""Say where the accuracy of a quantized model goes, and what brings it back (white paper, section 3.7, figure 9).

The figure asks, in this order: does the model without quantization compute what the float model does? Do the weights
or the activations do the damage? Which tensor? What is wrong with it? A measurement answers each question, and each
remedy is tried before it is named.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.diagnosis.checks import finding_without_quantizers, notes, unsettled_batchnorm, untrained
from halfeven.diagnosis.culprits import find_culprit
from halfeven.diagnosis.deployed_file import FileFacts, run_file
from halfeven.diagnosis.diagnosis import Diagnosis, Finding, TensorDiagnosis
from halfeven.diagnosis.divergence import comparable, error_share
from halfeven.diagnosis.exchanged_ranges import planned_quantizers, raising_bits
from halfeven.diagnosis.not_finite import (
    WEIGHTS_NOT_FINITE,
    finding_of_operator,
    finding_of_weights,
    first_broken_batch,
    with_operator,
)
from halfeven.diagnosis.patient import Patient
from halfeven.diagnosis.restarted import float_tensors
from halfeven.diagnosis.sensitivity import (
    RANKING_SAMPLES,
    SCREENING_SAMPLES,
    Reference,
    Sensitivity,
    divergence_of,
    divergences,
    reference_of,
    sensitivities,
)
from halfeven.diagnosis.statistics import TensorStatistics, tensor_statistics
from halfeven.errors import AlgorithmError, PlacementError
from halfeven.evaluation import Evaluate, evaluating, metric_values
from halfeven.graph.wrappers import unwrapped
from halfeven.layerwise.float_equivalence import float_function
from halfeven.layerwise.outputs import first_samples
from halfeven.layerwise.sqnr import sqnr, top1_agreement
from halfeven.options import PositiveInt
from halfeven.placement.insertion import is_quantized, plan_of
from halfeven.placement.make_plan import named_nodes

WORTH_NAMING = 0.1
"""Share of the damage that a remedy must take away for its cause to be a finding."""
MAX_CAUSES = 3
"""Largest number of causes that are sought one after the other."""
HEALTHY_ERROR_SHARE = 0.01
"""Share of error in the outputs' variation (20 dB), up to which nothing needs to be found."""
CAPTURE_DAMAGE_SHARE = 0.4
"""Share of the whole divergence that is there without quantizers, from which it is the first finding."""
HISTOGRAM_BINS = 48
"""Bins of a tensor's histogram."""
MAX_CHANNELS = 512
"""Largest number of channels whose ranges are kept."""


@checked_arguments(AlgorithmError)
def diagnose(
    qmodel: nn.Module,
    float_model: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Evaluate | None = None,
    samples: PositiveInt = RANKING_SAMPLES,
    runtime: bool = True,
    log: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Find where the accuracy of a quantized model goes, and the cheapest remedies that bring it back.

    No labels are needed: the float model's answers are what the quantized model is compared with. Neither model is
    changed. Remedies are tried on copies.

    Args:
        qmodel: a calibrated model, from `prepare` and `calibrate`, `quantize`, `load` or a training.
        float_model: the float model that it was made from.
        batches: calibration batches, as `calibrate` takes them.
        evaluate: gives a model's accuracy, more being better, for the float, the quantized and the repaired model: a
            number, or a number for each sample; None: accuracy is not measured.
        samples: number of samples; whole batches are taken.
        runtime: write the model's file too, run it on the first 8 samples, and say where it parts from the quantized
            model and how long its layers take.
        log: called with each question and its answer, for example `print`.

    Raises:
        CalibrationError: there is no batch, a batch does not fit the example, or a range is not set.
        ConfigError: the result of `evaluate` is no finite number.
        PlacementError: the first model is not a quantized model, or the second is one or returns other shapes.
    """
    qmodel = unwrapped(qmodel)
    float_model = unwrapped(float_model)
    log = log or (lambda text: None)
    _check_models(qmodel, float_model)
    # All measurements are of the same samples, so the batches are read once.
    chosen = first_samples(batches, samples)
    models = {"float": float_model, "quantized": qmodel}
    accuracy = {} if evaluate is None else _measure_accuracies(evaluate, models)  # a wrong metric shows at once
    # Measure: the float answers, the harm of each tensor, and what weights and activations do alone.
    reference = reference_of(qmodel, chosen, float_model=float_model, samples=samples)
    _check_same_shapes(qmodel, reference)
    patient = _examine(qmodel, chosen, reference)
    parts = _measure_parts(qmodel, reference)
    log(
        f"The answers differ from the float model's by {patient.divergence:.3g}; with all quantizers off by "
        f"{parts.without:.3g}, with weights alone quantized by {parts.weights:.3g}, with activations alone by "
        f"{parts.activations:.3g}."
    )
    # Find causes, each in the model that the remedies before it have repaired.
    found, repaired = _find_and_repair(patient, float_model, log)
    agreement = _measure_agreement(qmodel, reference)
    # This question stands first in the white paper's figure 9, so its finding comes before all others.
    ruined = parts.without >= CAPTURE_DAMAGE_SHARE * patient.divergence and agreement.error_share > HEALTHY_ERROR_SHARE
    if ruined and not any(finding.cause == WEIGHTS_NOT_FINITE for finding in found):
        found.insert(0, finding_without_quantizers(qmodel, parts.without, patient.divergence))
    if evaluate is not None and repaired is not qmodel:
        accuracy |= _measure_accuracies(evaluate, {"repaired": repaired})
    file = run_file(qmodel, reference.inputs[0], log) if runtime else FileFacts()
    return _make_diagnosis(patient, parts, agreement, tuple(found), accuracy, file)


def _check_models(qmodel: nn.Module, float_model: nn.Module) -> None:
    plan_of(qmodel)
    if is_quantized(float_model):
        raise PlacementError(
            "The second model is a quantized model, so a comparison with its answers would show nothing. Give the "
            "float model that the first was made from."
        )


def _check_same_shapes(qmodel: nn.Module, reference: Reference) -> None:
    """Refuse a float model whose outputs have other shapes than the quantized model's.

    Raises:
        PlacementError: they have.
    """
    args, kwargs = reference.inputs[0]
    with torch.no_grad(), evaluating(qmodel):
        found = [list(x.shape) for x in float_tensors(qmodel(*args, **kwargs))]
    expected = [list(x.shape) for x in reference.outputs[0]]
    if found != expected:
        raise PlacementError(
            f"The outputs of the first batch have the shapes {found} from the quantized model and {expected} from the "
            "float model, so they cannot be compared. Give the float model that the quantized model was made from."
        )


def _make_diagnosis(
    patient: Patient,
    parts: "Parts",
    agreement: "Agreement",
    findings: tuple[Finding, ...],
    accuracy: dict[str, float],
    file: FileFacts,
) -> Diagnosis:
    return Diagnosis(
        verdict=_verdict(findings, agreement),
        samples=agreement.samples,
        divergence=patient.divergence,
        divergence_without_quantizers=parts.without,
        divergence_of_weights=parts.weights,
        divergence_of_activations=parts.activations,
        sqnr=agreement.sqnr,
        error_share=agreement.error_share,
        agreement=agreement.top1,
        tensors=_describe_tensors(patient),
        findings=findings,
        accuracy=accuracy,
        notes=(*notes(patient.qmodel, patient.reference), *file.notes),
        latency_ms=file.latency_ms,
        layer_times=file.layers,
        order=_graph_order(patient.qmodel),
        plan=plan_of(patient.qmodel).to_dict(),
    )


def _examine(qmodel: nn.Module, batches: list[Any], reference: Reference, *, alone: bool = True) -> Patient:
    found = sensitivities(qmodel, batches, reference=reference, alone=alone, ranked_by=SCREENING_SAMPLES)
    return Patient(qmodel, batches, reference, found, tensor_statistics(qmodel, reference.inputs))


@dataclass(frozen=True)
class Parts:
    """Divergences of a model of which only a part is quantized."""

    without: float
    """All quantizers off."""
    weights: float
    activations: float


def _measure_parts(qmodel: nn.Module, reference: Reference) -> Parts:
    planned = planned_quantizers(qmodel)
    # White paper, section 3.7: weights alone are those with all activations in float, and the other way round.
    others = {weight: [q for q, _ in planned if q.weight is not weight] for weight in (True, False)}
    found = divergences(qmodel, reference, others, lambda group: raising_bits(group, {}))
    with torch.no_grad(), float_function(qmodel):
        return Parts(divergence_of(qmodel, reference), found[True], found[False])


def _find_and_repair(
    patient: Patient, float_model: nn.Module, log: Callable[[str], None]
) -> tuple[list[Finding], nn.Module]:
    """Return the findings, and the model that their remedies have made."""
    found: list[Finding] = []
    whole = patient.divergence
    # Asked of the float model: with such statistics its answers, which all else is compared with, are wrong.
    settled = unsettled_batchnorm(float_model, patient.reference.inputs)
    if settled is not None and not untrained(float_model):
        found.append(settled)
    repaired = patient.qmodel
    broken = first_broken_batch(repaired, patient.reference)
    if broken is not None and (weights := finding_of_weights(repaired)) is not None:
        return [*found, weights], repaired
    for turn in range(MAX_CAUSES):
        if _measure_agreement(patient.qmodel, patient.reference).error_share <= HEALTHY_ERROR_SHARE:
            break
        result = find_culprit(patient, first=turn == 0)
        if result is None or (result[0].recovered or 0.0) <= WORTH_NAMING:
            # That answers are not finite is a finding, also where no remedy helps.
            found += [] if broken is None else [finding_of_operator(patient.qmodel, broken)]
            break
        finding, repaired = result
        if broken is not None:
            finding = with_operator(finding, patient.qmodel, broken)
        found.append(finding)
        log(f"{finding.cause}: {finding.where}; {finding.remedy} takes away {finding.recovered:.0%}.")
        # Nine tenths of the damage are gone: what is left is not worth another finding.
        left = divergence_of(repaired, patient.reference)
        if (left < whole / 10 and broken is None) or turn == MAX_CAUSES - 1:
            break
        # Answers that are not finite hide all other damage, which is looked for once they are mended.
        if broken is not None and (broken := first_broken_batch(repaired, patient.reference)) is None:
            whole = left
        # The next cause is sought in the repaired model: a tensor that the first one hid may show.
        patient = _examine(repaired, list(patient.batches), patient.reference, alone=False)
    if settled is not None and untrained(float_model):
        found.append(settled)  # of an untrained model, what quantization does to it is asked first
    return found, repaired


@dataclass(frozen=True)
class Agreement:
    """The agreement of a model's outputs with the float model's."""

    sqnr: float
    error_share: float
    top1: float | None
    samples: int


@torch.no_grad()
def _measure_agreement(qmodel: nn.Module, reference: Reference) -> Agreement:
    with evaluating(qmodel):
        found = [float_tensors(qmodel(*args, **kwargs)) for args, kwargs in reference.inputs]
    batches = zip(found, reference.outputs, strict=True)
    pairs = [comparable(f, e) for fs, es in batches for f, e in zip(fs, es, strict=True)]
    firsts = [fs[0] for fs in found], [es[0] for es in reference.outputs]
    shares = [error_share(fs, es) for fs, es in zip(found, reference.outputs, strict=True)]
    return Agreement(
        sqnr=sqnr([f for f, _ in pairs], [e for _, e in pairs]),
        error_share=sum(w * share for w, share in zip(reference.weights, shares, strict=True)),
        top1=top1_agreement(*firsts),
        samples=sum(reference.counts),
    )


def _measure_accuracies(evaluate: Evaluate, models: Mapping[str, nn.Module]) -> dict[str, float]:
    return {name: float(metric_values(evaluate, model).mean()) for name, model in models.items()}


def _verdict(findings: Sequence[Finding], agreement: Agreement) -> str:
    if findings:
        first = findings[0]
        brought = "" if first.recovered is None else f", which takes away {first.recovered:.0%} of the damage"
        cause = first.cause[0].upper() + first.cause[1:]
        return f"{cause} ({first.where}); the remedy is {first.remedy}{brought}."
    same = "" if agreement.top1 is None else f", and {agreement.top1:.1%} of the top-1 answers are the same"
    error = f"error is {agreement.error_share:.2%} of the outputs' variation{same}"
    if agreement.error_share <= HEALTHY_ERROR_SHARE:
        return f"Nothing needs mending: {error}."
    return f"{error[0].upper()}{error[1:]}; no remedy that was tried takes away a tenth of the damage."


def _graph_order(qmodel: nn.Module) -> tuple[tuple[str, bool], ...]:
    """Return (name, weight) of all quantized tensors in the order of the graph; a weight before its layer's output."""
    position = {name: number for number, name in enumerate(named_nodes(qmodel))}
    rows = []
    for q, planned in planned_quantizers(qmodel):
        place = planned.name if q.weight else planned.places[0]  # type: ignore[union-attr]
        # False sorts before True: the weight of a layer comes before the tensor that it puts out.
        rows.append((position.get(place, 0), not q.weight, (planned.name, q.weight)))
    return tuple(name for _, _, name in sorted(rows))


def _describe_tensors(patient: Patient) -> tuple[TensorDiagnosis, ...]:
    planned = {(entry.name, q.weight): entry for q, entry in planned_quantizers(patient.qmodel)}
    return tuple(
        _describe_tensor(tensor, planned[tensor.name, tensor.weight], patient.statistics[tensor.name, tensor.weight])
        for tensor in patient.sensitivities.tensors
    )


def _describe_tensor(tensor: Sensitivity, planned: Any, found: TensorStatistics) -> TensorDiagnosis:
    low, high = found.bounds
    values = found.sample
    values = values[values.isfinite()]  # a batch may hold others than the calibration did
    smallest, largest = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    counts = torch.histc(values, HISTOGRAM_BINS, smallest, largest) if largest > smallest else torch.empty(0)
    spread = found.channel_spread()
    channels = torch.empty(0) if spread is None else found.channel_largest[spread[0]]
    return TensorDiagnosis(
        name=tensor.name,
        weight=tensor.weight,
        places=(planned.name,) if tensor.weight else planned.places,
        scheme=str(planned.scheme),
        bits=tensor.bits,
        observer=str(planned.observer),
        raised_bits=tensor.raised_bits,
        kl_in_context=tensor.kl_in_context,
        kl_alone=tensor.kl_alone or 0.0,
        sqnr=found.sqnr,
        sqnr_of_outputs=float("inf") if tensor.sqnr_alone is None else tensor.sqnr_alone,
        clipped_share=found.clipped_share,
        vanished_share=found.vanished_share,
        dead_levels=found.dead_levels,
        worst_channels=tuple(found.worst_channels()),
        low=low,
        high=high,
        histogram=tuple(int(count) for count in counts),
        smallest=smallest,
        largest=largest,
        channel_largest=tuple(float(value) for value in channels[:MAX_CHANNELS]),
    )
