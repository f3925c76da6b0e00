"""Judge a model against the float model: by a metric with its confidence interval, or by its answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfeven.diagnosis.divergence import broken_samples, divergence
from halfeven.diagnosis.restarted import float_tensors
from halfeven.diagnosis.sensitivity import Reference
from halfeven.errors import ConfigError
from halfeven.evaluation import Evaluate, evaluating, metric_values
from halfeven.quantization.model_quantizers import weights_quantized_once

CONFIDENCE = 1.96
"""Standard deviations on each side of an interval that holds in 95 % of cases."""


@dataclass(frozen=True)
class Judgement:
    """The drop of a model from the float model."""

    drop: float
    """In the metric's unit; without a metric, the percentage of answers that differ, or 100 times the divergence of
    outputs that are no class scores."""
    interval: float | None
    """Half of the drop's 95 % confidence interval; None where the metric came as one number."""

    def __str__(self) -> str:
        """Return the drop with its interval."""
        return f"{self.drop:.3g}" + ("" if self.interval is None else f" ± {self.interval:.2g}")


class Judge:
    """Measures drops from the float model.

    Args:
        float_model: the float model.
        evaluate: the metric; None: answers are compared.
        reference: held-out batches with the float answers, for a judgement without a metric.
    """

    def __init__(self, float_model: nn.Module, evaluate: Evaluate | None, reference: Reference) -> None:
        self.evaluate = evaluate
        self.reference = reference
        # Measured once: all drops are from the same numbers.
        self.expected = None if evaluate is None else metric_values(evaluate, float_model)

    @property
    def unit(self) -> str:
        """The words for a drop."""
        if self.evaluate is not None:
            return "drop of the metric"
        return "% of answers changed" if all(map(_are_scores, self.reference.outputs)) else "100 x divergence"

    def __call__(self, model: nn.Module) -> Judgement:
        """Return the drop of a model.

        Raises:
            ConfigError: the metric is no finite number, or has another number of samples than for the float model.
        """
        if self.expected is None or self.evaluate is None:
            return self._judge_answers(model)
        scores = metric_values(self.evaluate, model)
        if scores.shape != self.expected.shape:
            raise ConfigError(
                f"evaluate returned {scores.numel()} values for a quantized model and {self.expected.numel()} for the "
                "float model, so they cannot be compared. Return the same samples for both."
            )
        return _mean_difference(self.expected - scores)

    @torch.no_grad()
    def _judge_answers(self, model: nn.Module) -> Judgement:
        """Return the percentage of answers that differ, or 100 times the divergence of other outputs than scores."""
        changed: list[Tensor] = []
        with evaluating(model), weights_quantized_once(model):
            for (args, kwargs), expected in zip(self.reference.inputs, self.reference.outputs, strict=True):
                found = float_tensors(model(*args, **kwargs))
                changed.append(_changed_answers(found, expected))
        return _mean_difference(100 * torch.cat(changed))


def _are_scores(outputs: Sequence[Tensor]) -> bool:
    """Return True where the first output is class scores, [samples, classes]."""
    return outputs[0].ndim == 2 and outputs[0].shape[1] > 1


def _changed_answers(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    # Class scores give a number for each sample, and so an interval; other outputs one for each batch.
    if _are_scores(expected):
        changed = found[0].argmax(1) != expected[0].argmax(1)
        return (changed | broken_samples(found[0], expected[0])).double().cpu()
    return torch.tensor([divergence(found, expected)], dtype=torch.float64)


def _mean_difference(differences: Tensor) -> Judgement:
    """Return the mean of the differences of all samples, with its interval."""
    count = differences.numel()
    drop = float(differences.mean())
    if count < 2:
        return Judgement(drop, None)
    # Differences are paired, sample by sample, so what both models get wrong does not widen the interval.
    return Judgement(drop, CONFIDENCE * float(differences.std()) / math.sqrt(count))
