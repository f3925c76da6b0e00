"""Distances between the outputs of two models: SQNR, largest relative difference, equal top-1 answers."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def sqnr(found: Iterable[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the signal-to-quantization-noise ratio of tensors in dB.

    10 log10(sum expected^2 / sum (found - expected)^2), summed over all elements of all tensors (white paper, section
    3.7 and figure 9, arXiv:2106.08295, debugs with it). Infinite where they are equal, and minus infinity where what
    was found is NaN or infinite.

    Args:
        found: tensors of the quantized model, in the order and with the shapes of `expected`.
        expected: tensors of the float model.
    """
    # In float64: squares of millions of small errors would vanish beside a large sum in float32.
    signal = sum(float(e.double().square().sum()) for e in expected)
    noise = sum(float((f - e).double().square().sum()) for f, e in zip(found, expected, strict=True))
    if math.isnan(noise) and math.isfinite(signal):
        return float("-inf")
    return float(10 * torch.log10(torch.tensor(signal / noise))) if noise else float("inf")


def decibels(relative_error: float) -> float:
    """Return the SQNR in dB of a squared error relative to the squared signal, at most 300 dB."""
    return -10 * math.log10(max(relative_error, 1e-30))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected magnitude; infinite for NaN and infinities."""
    if not expected.numel():
        return 0.0
    # Where all that is expected is 0, the difference itself is returned.
    scale = float(expected.abs().max()) or 1.0
    worst = float((found - expected).abs().max()) / scale
    # NaN is the one number that is not equal to itself.
    return worst if worst == worst else float("inf")


def top1_agreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Return the fraction of samples with the same top-1 class.

    Args:
        found, expected: logits, [samples, classes] each.

    Returns:
        From 0 to 1; None where a tensor does not have the shape of logits.
    """
    if any(x.ndim != 2 or x.shape[1] < 2 for x in expected):
        return None
    pairs = list(zip(found, expected, strict=True))
    # Scores of NaN are no answer; `argmax` takes NaN for the largest.
    same = torch.cat([(f.argmax(1) == e.argmax(1)) & ~(f.isnan() & ~e.isnan()).any(1) for f, e in pairs])
    return float(same.float().mean())
