"""The distance of a model's answers from the float model's, without labels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NOT_FINITE = 1e3
"""Divergence of a sample whose answer is NaN or infinite and the float model's is not. A finite number, so that what
mends some of the samples shows."""
SUM_TOLERANCE = 1e-3
"""Largest distance from 1 of a sum of probabilities."""


def divergence(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return how far the outputs for a batch are from the float model's, summed over the outputs.

    Class scores, [samples, classes], and probabilities are compared by the Kullback-Leibler divergence in nats, mean
    over the samples: it counts what changes the answer, and nothing else. All other outputs are compared by the mean
    squared error over the variance between the samples, in which a constant part of the output does not count. A
    sample that is NaN or infinite counts `NOT_FINITE`; where the float model is not finite, nothing is compared.

    Args:
        found: outputs of the model, with the shapes of `expected`.
        expected: outputs of the float model.
    """
    return sum(_output_divergence(f.double(), e.double()) for f, e in zip(found, expected, strict=True))


def error_share(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the share of error in the outputs' variation between the samples, from 0 to 1, of the output with most."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True) if e.numel()]
    shares = (1.0 if bool(broken_samples(f, e).any()) else _relative_error(*comparable(f, e)) for f, e in pairs)
    return max(shares, default=0.0)


def broken_samples(found: Tensor, expected: Tensor) -> Tensor:
    """Return True for each sample that is NaN or infinite anywhere where the float model is not, [samples]."""
    broken = ~found.isfinite() & expected.isfinite()
    return broken.flatten(1).any(1) if broken.ndim > 1 else broken.reshape(-1)


def comparable(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs with the same number in both where the float model's is NaN or infinite, as by a mask of -inf."""
    finite = expected.isfinite()
    if bool(finite.all()):
        return found, expected
    # The smallest score hardly counts in a softmax, as that of a masked class does not.
    neutral = expected[finite].min() if bool(finite.any()) else expected.new_zeros(())
    return torch.where(finite, found, neutral), torch.where(finite, expected, neutral)


def _output_divergence(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    found, expected = comparable(found, expected)
    broken = broken_samples(found, expected)
    if bool(broken.any()):
        share = float(broken.double().mean())
        whole = ~broken if expected.ndim else broken.new_zeros(0)
        rest = _output_divergence(found[whole], expected[whole]) if bool(whole.any()) else 0.0
        return share * NOT_FINITE + (1 - share) * rest
    axis = _probability_axis(expected)
    if axis is not None:
        # A probability of 0 has no logarithm; the smallest normal number stands for it.
        smallest = torch.finfo(torch.float32).tiny
        return _kullback_leibler(found.clamp(min=smallest).log(), expected.clamp(min=smallest).log(), axis)
    if expected.ndim == 2 and expected.shape[1] > 1:
        return _kullback_leibler(F.log_softmax(found, 1), F.log_softmax(expected, 1), 1)
    return _relative_error(found, expected)


def _kullback_leibler(found: Tensor, expected: Tensor, axis: int) -> float:
    """Return the mean of KL(expected || found) over all distributions, from logarithms of probabilities."""
    return float((expected.exp() * (expected - found)).sum(axis).mean())


def _probability_axis(expected: Tensor) -> int | None:
    """Return the axis over which all values sum to 1; None if there is none."""
    if expected.ndim < 2 or bool((expected < 0).any()):
        return None
    # The last axis first, as of tokens; axis 1 as of the pixels of a segmentation.
    for axis in (expected.ndim - 1, 1):
        sums = expected.sum(axis)
        if expected.shape[axis] > 1 and bool(((sums - 1).abs() < SUM_TOLERANCE).all()):
            return axis
    return None


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the mean share of error of the features: of the channels on axis 1 or on the last, whichever has more."""
    if expected.ndim < 2:
        found, expected = found.reshape(-1, 1), expected.reshape(-1, 1)
    return max(_feature_divergence(found, expected, axis) for axis in {1, expected.ndim - 1})


def _feature_divergence(found: Tensor, expected: Tensor, axis: int) -> float:
    others = [other for other in range(expected.ndim) if other != axis]
    error = (found - expected).square().mean(others)
    # Over the samples alone: what is the same for all of them carries no answer.
    centred = expected - expected.mean(0, keepdim=True) if len(expected) > 1 else expected
    # Where all samples have the same answer, there is no variance to compare with.
    spread = centred.square().mean(others)
    spread = torch.where(spread > 0, spread, expected.square().mean(others))
    # error / (error + spread) is 0 without an error and nears 1 for noise, so that no channel without variance
    # dominates.
    total = error + spread
    return float(torch.where(total > 0, error / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0).mean())
