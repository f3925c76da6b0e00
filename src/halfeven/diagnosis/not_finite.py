"""Say why a quantized model answers NaN or infinity: weights that are not finite, or an operator that made them so."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.diagnosis.causes import Cause
from halfeven.diagnosis.diagnosis import Finding
from halfeven.diagnosis.divergence import broken_samples
from halfeven.diagnosis.restarted import RestartedForward, Stop, float_tensors, forward_of
from halfeven.diagnosis.sensitivity import Reference
from halfeven.evaluation import evaluating
from halfeven.graph.batches import Inputs
from halfeven.layerwise.float_equivalence import float_function

WEIGHTS_NOT_FINITE = "weights are NaN or infinite"
SHOWN_NAMES = 4
"""Largest number of names in a finding."""


@torch.no_grad()
def first_broken_batch(qmodel: nn.Module, reference: Reference) -> Inputs | None:
    """Return the first batch for which a model answers NaN or infinity where the float model does not; None if none."""
    with evaluating(qmodel):
        for inputs, expected in zip(reference.inputs, reference.outputs, strict=True):
            args, kwargs = inputs
            found = float_tensors(qmodel(*args, **kwargs))
            if any(bool(broken_samples(f, e).any()) for f, e in zip(found, expected, strict=True)):
                return inputs
    return None


def finding_of_weights(qmodel: nn.Module) -> Finding | None:
    """Return the finding that parameters of a model hold NaN or infinity; None if all are finite."""
    bad = [name for name, p in qmodel.named_parameters() if not bool(p.isfinite().all())]
    # An infinity may be a mask's in a buffer; NaN is nothing of use.
    bad += [name for name, b in qmodel.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]
    if not bad:
        return None
    more = f" and {len(bad) - SHOWN_NAMES} more" if len(bad) > SHOWN_NAMES else ""
    return Finding(
        cause=WEIGHTS_NOT_FINITE,
        where=", ".join(bad[:SHOWN_NAMES]) + more,
        evidence="They make the answers NaN or infinite, whatever the ranges are. A training with too high a rate, or "
        "a damaged file, leaves such weights.",
        remedy="load the weights of an earlier checkpoint, or quantize the float model again (not tried)",
        paste="",
    )


def with_operator(finding: Finding, qmodel: nn.Module, inputs: Inputs) -> Finding:
    """Return the finding of a remedy that mends answers, with the operator that made them NaN or infinite as its cause.

    Args:
        finding: what was found of a model that answers NaN or infinity.
        qmodel: the model.
        inputs: a batch that it does so for.
    """
    cause, where = cause_of_not_finite(qmodel, inputs)
    evidence = f"{cause.evidence} {finding.where}: {finding.cause}. {finding.evidence}"
    return dataclasses.replace(finding, cause=cause.name, where=where, evidence=evidence)


def finding_of_operator(qmodel: nn.Module, inputs: Inputs) -> Finding:
    """Return the finding of an operator that makes NaN or infinity where no remedy that was tried mends it."""
    cause, where = cause_of_not_finite(qmodel, inputs)
    return Finding(
        cause=cause.name,
        where=where,
        evidence=cause.evidence,
        remedy="keep what it reads away from such values in the model, as by adding a small constant (not tried)",
        paste="",
    )


@torch.no_grad()
def cause_of_not_finite(qmodel: nn.Module, inputs: Inputs) -> tuple[Cause, str]:
    """Return the first operator of a quantized model that makes NaN or infinity where the float model does not.

    Args:
        qmodel: a quantized model that answers NaN or infinity.
        inputs: the batch that it does so for.

    Returns:
        The cause, and the name of the operator.
    """
    forward = forward_of(qmodel)
    with evaluating(qmodel):
        if not isinstance(forward, RestartedForward):
            return _cause_at("the model", "", "")
        with float_function(qmodel):
            # What is not finite in float, as a mask of minus infinity, is none of quantization's doing.
            usual = {number for number, _, found in _operations(forward, inputs) if not _finite(found)}
        for number, operands, found in _operations(forward, inputs):
            if number in usual or _finite(found):
                continue
            op = forward.operations[number]
            zeros = [float((x == 0).double().mean()) for x in operands]
            # A logarithm and a quotient are infinite at 0, where rounding takes small values.
            read = f" Of what it reads, {max(zeros):.1%} is 0." if any(zeros) else ""
            return _cause_at(op.name, op.node.name, read)
    return _cause_at("the model", "", "")


def _cause_at(operator: str, name: str, read: str) -> tuple[Cause, str]:
    what = f"At {name}, values" if name else "Answers"
    evidence = f"{what} are NaN or infinite in the quantized model, and finite in the float model.{read}"
    return Cause(f"{operator} makes NaN or infinity of quantized values", evidence), name or operator


def _operations(forward: RestartedForward, inputs: Inputs) -> Iterator[tuple[int, list[Tensor], Any]]:
    """Run a model; yield the number, the operands and the result of each operator."""
    stop: Stop = forward.start(inputs)
    for number, op in enumerate(forward.operations[:-1]):
        if op.is_input or op.is_constant:
            continue
        forward.advance(stop, number)
        operands = float_tensors([stop.values.get(node) for node in op.node.all_input_nodes])
        forward.advance(stop, number + 1)
        yield number, operands, stop.values.get(op.node)


def _finite(found: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in float_tensors(found))
