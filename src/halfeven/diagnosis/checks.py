"""Checks beside the ranges: statistics that do not fit, layers in float, modules in Python, the runtime."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.diagnosis.diagnosis import Finding
from halfeven.diagnosis.divergence import divergence
from halfeven.diagnosis.exchanged_ranges import planned_quantizers
from halfeven.diagnosis.restarted import float_tensors
from halfeven.diagnosis.sensitivity import Reference
from halfeven.diagnosis.trials import rules_argument
from halfeven.evaluation import evaluating
from halfeven.graph.batches import Inputs
from halfeven.graph.copying import copy_model
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import kind_of
from halfeven.layerwise.batchnorm_statistics import batchnorms
from halfeven.layerwise.clipping import clipping_sentence, counting_clipped
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.layerwise.training_mode import at_start, normalizing_by_batch, trained_batchnorms, unfrozen_batchnorms
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.options import Rule
from halfeven.placement.plan import PlannedTensor, PlannedWeight

FEWEST_SAMPLES = 8
"""Samples of a batch from which BatchNorm's statistics of the batch say something."""
UNSETTLED_DISTANCE = 1.0
"""Distance of the batches' mean from the running mean, in standard deviations, or of the logarithm (base 2) of their
variances, in the median channel of a BatchNorm."""


@torch.no_grad()
def unsettled_batchnorm(model: nn.Module, inputs: Sequence[Inputs]) -> Finding | None:
    """Return the finding that running statistics do not describe the batches; None if they do.

    Answers cannot show it: with such statistics the float model's own answers are wrong. So the statistics are
    compared, and the float model's answers in eval mode with those that it gives with the batches' own statistics.

    Args:
        model: the float model.
        inputs: calibration batches, as arguments of the model.
    """
    norms = unfrozen_batchnorms(model)
    given = [row for row in joined_batches(inputs, FEWEST_SAMPLES) if _batch_size(row) >= FEWEST_SAMPLES]
    if not norms or not given:
        return None
    # First the statistics are compared, then what they do to the answers: other statistics may still give the same
    # ones.
    settled = copy_model(model)
    re_estimate(settled, [kwargs or (args,) for args, kwargs in given])  # without labels, which a batch may hold
    distances = _statistics_distances(model, settled)
    name, worst = max(distances.items(), key=lambda row: row[1])
    if worst < UNSETTLED_DISTANCE:
        return None
    # Where the statistics describe the batches, eval mode and the batches' own statistics give about the same answers.
    before, after = _eval_against_batch(model, given), _eval_against_batch(settled, given)
    if after >= before:
        return None
    unsettled = sum(distance >= UNSETTLED_DISTANCE for distance in distances.values())
    untrained = " No batch has moved them: the model is not trained." if all(map(at_start, norms)) else ""
    return Finding(
        cause="BatchNorm's running statistics do not describe the batches",
        where=name,
        evidence=f"{unsettled} of {len(distances)} BatchNorms differ from their batches by more than a standard "
        "deviation or a factor of 2; the float model's own answers in eval mode "
        f"and with the batches' statistics differ by {before:.2g}.{untrained}",
        remedy="re-estimated statistics, before the model is quantized",
        paste="halfeven.layerwise.re_estimate.re_estimate(model, batches)",
        recovered=1 - after / before,
    )


def untrained(model: nn.Module) -> bool:
    """Return True for a model whose BatchNorms all have the statistics of new modules."""
    norms = unfrozen_batchnorms(model)
    return bool(norms) and all(map(at_start, norms))


def joined_batches(inputs: Sequence[Inputs], samples: int) -> list[Inputs]:
    """Return batches of at least so many samples, where neighbours can be joined; else the batches as they are."""
    found: list[Inputs] = []
    for row in inputs:
        joined = _joined(found[-1], row) if found and _batch_size(found[-1]) < samples else None
        if joined is None:
            found.append(row)
        else:
            found[-1] = joined
    return found


def _joined(first: Inputs, second: Inputs) -> Inputs | None:
    """Return two batches as a single one; None where an argument does not have the samples on its first axis."""
    before, form = pytree.tree_flatten(first)
    after, other = pytree.tree_flatten(second)
    sizes = _batch_size(first), _batch_size(second)
    if form != other or not all(_can_join(a, b, sizes) for a, b in zip(before, after, strict=True)):
        return None
    joined: Inputs = pytree.tree_unflatten([torch.cat(pair) for pair in zip(before, after, strict=True)], form)
    return joined


def _can_join(first: Any, second: Any, sizes: tuple[int, int]) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim and second.ndim):
        return False
    return (len(first), len(second)) == sizes and first.shape[1:] == second.shape[1:]


def _batch_size(inputs: Inputs) -> int:
    return max((len(x) for x in float_tensors(inputs) if x.ndim), default=0)


def _statistics_distances(model: nn.Module, settled: nn.Module) -> dict[str, float]:
    """Return how far each BatchNorm's statistics are from the batches'."""
    found = {}
    other = batchnorms(settled)
    for name, norm in batchnorms(model).items():
        if norm.running_mean is None or norm.running_var is None or name not in other:
            continue
        mean, variance = other[name].running_mean, other[name].running_var
        assert mean is not None
        assert variance is not None
        # Both in units in which 1 is much: standard deviations of the mean, and doublings of the variance.
        shift = (mean - norm.running_mean).abs() / (variance + norm.eps).sqrt()
        ratio = torch.log2((variance + norm.eps) / (norm.running_var + norm.eps)).abs()
        found[name or "the BatchNorm"] = float(torch.maximum(shift, ratio).median())
    return found


def _eval_against_batch(model: nn.Module, inputs: Sequence[Inputs]) -> float:
    """Return how far a model's answers in eval mode are from those with the batches' own statistics."""
    total = 0.0
    with evaluating(model):
        for args, kwargs in inputs:
            found = float_tensors(model(*args, **kwargs))
            with normalizing_by_batch(list(batchnorms(model).values())):
                expected = float_tensors(model(*args, **kwargs))
            total += divergence(found, expected)
    return total / len(inputs)


def finding_without_quantizers(qmodel: nn.Module, without: float, whole: float) -> Finding:
    """Return the finding that the model does not compute what the float model does, activations aside."""
    rounded = [planned for q, planned in planned_quantizers(qmodel) if q.weight and q.state.fixed]
    if rounded:
        return _finding_of_rounded_weights(rounded, without, whole)
    return Finding(
        cause="without its quantizers, the model does not compute what the float model does",
        where="the weights",
        evidence=f"With all quantizers off, the answers differ by {without:.3g}; quantized, by {whole:.3g}. Training "
        "or an algorithm has changed the weights, or the model was made from another float model.",
        remedy="none if the model was trained, which moves it away from the float model: judge it by a metric "
        "(evaluate); else prepare it again from this float model, or compare it with its own",
        paste="",
    )


def _finding_of_rounded_weights(
    rounded: Sequence[PlannedTensor | PlannedWeight], without: float, whole: float
) -> Finding:
    """Return the finding that weights whose rounding was learned do the damage: there are no float weights to try."""
    bits = min(planned.scheme.bits for planned in rounded)
    rule = Rule(weight_bits=8)
    return Finding(
        cause=f"{bits} bits are too few for weights, even with learned rounding" if bits < 8 else "rounded weights",
        where=f"{rounded[0].name}" + (f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""),
        evidence=f"Weights stay rounded with all quantizers off. The answers differ by {without:.3g} then, and by "
        f"{whole:.3g} with quantized activations. A float model that is not the model's own would look the same.",
        remedy="8 bits for weights, in a model quantized anew (not tried: the float weights are gone)",
        paste=rules_argument([rule]) if bits < 8 else "",
        rules=(rule,) if bits < 8 else (),
        further="halfeven.search(model, batches, max_drop=...) finds the layers that need them: docs/search.md",
    )


def notes(qmodel: nn.Module, reference: Reference) -> list[str]:
    """Return further observations of a quantized model, a sentence each."""
    plan = plan_of(qmodel)
    found = [*_float_answers_not_finite(reference), *_clipped_in_training(qmodel, reference)]
    found += [f"In Python for training: {kept}" for kept in plan.kept]
    quantized = {weight.name for weight in plan.weights}
    # Only layers and matrix products are worth a note: they do nearly all of the work.
    heavy = [left for left in plan.left if _is_product(qmodel, left.name) and left.name not in quantized]
    alike: dict[tuple[str, str], list[str]] = {}
    for left in heavy:
        alike.setdefault((left.operator, left.reason), []).append(left.name)
    return found + [
        f"In float: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({operator}): {reason}."
        for (operator, reason), names in alike.items()
    ]


def _float_answers_not_finite(reference: Reference) -> list[str]:
    """Return a note where the float model itself answers NaN."""
    counts = [max((int(x.isnan().sum()) for x in batch), default=0) for batch in reference.outputs]
    if not any(counts):
        return []
    first = next(number for number, count in enumerate(counts) if count)
    return [
        f"The float model itself answers NaN, first in batch {first} (counted from 0); such answers are not compared. "
        "Look for inputs or weights that are not finite."
    ]


@torch.no_grad()
def _clipped_in_training(qmodel: nn.Module, reference: Reference) -> list[str]:
    """Return a note where training, which normalizes by the batch, clips too many values."""
    norms = trained_batchnorms(qmodel)
    if not norms or _batch_size(reference.inputs[0]) < FEWEST_SAMPLES:
        return []
    args, kwargs = reference.inputs[0]
    with evaluating(qmodel), normalizing_by_batch(norms), counting_clipped(qmodel) as counts:
        qmodel(*args, **kwargs)
    return [f"{clipping_sentence(counts.excessive(), len(counts.seen))}."] if counts.excessive() else []


def _is_product(qmodel: nn.Module, name: str) -> bool:
    node = named_nodes(qmodel).get(name)
    return node is not None and kind_of(node[1]) in (*WEIGHTED, OperatorKind.MATMUL)
