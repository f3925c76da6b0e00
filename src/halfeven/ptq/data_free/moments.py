"""Moments without data: mean, standard deviation and extent of each channel of a tensor, and how operators change them.

Channels are assumed to be Gaussian where a function reads them, and independent where they meet. Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 and appendix C
(arXiv:1906.04721); white paper, sections 3.1 and 3.3 (arXiv:2106.08295).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.special import ndtr

QUADRATURE_POINTS = 513
"""Points at which a function is evaluated to integrate it over a Gaussian, or to find its extremes."""
QUADRATURE_DEVIATIONS = 8.0
"""Standard deviations on each side that the integral covers: the rest weighs less than 1e-14."""

Bound = float | Tensor
"""A bound of all channels, or of each, [channels]."""


@dataclass(frozen=True)
class Distribution:
    """Mean, standard deviation, and the extent [low, high] that a range should cover: [channels] each, in float64.

    The tensors are on the CPU, wherever the model is: they hold few numbers.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    axis: int | None = None
    """Axis of the tensor that the channels lie on; None: one channel that stands for all elements."""
    measured: bool = True
    """True where it rests on BatchNorm's statistics alone, which were measured on the training data."""


def gaussian(mean: Tensor, std: Tensor, alpha: float, axis: int | None, measured: bool) -> Distribution:
    """Return a Gaussian whose extent is `alpha` standard deviations on both sides (white paper, section 3.1)."""
    mean = mean.detach().double().cpu()
    std = std.detach().double().cpu()
    return Distribution(mean, std, mean - alpha * std, mean + alpha * std, axis, measured)


def clipped_moments(mean: Tensor, std: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of clip(x, low, high) for Gaussian x; ReLU has the bounds 0 and infinity.

    With a = (low - mean) / std, b = (high - mean) / std, and density p and distribution function P of N(0, 1):
    E = low P(a) + high (1 - P(b)) + mean (P(b) - P(a)) + std (p(a) - p(b)), and likewise for the square (appendix C
    of the first paper).

    Args:
        mean, std: moments of x, [channels].
        low, high: bounds, which may be infinite: a number, or [channels].

    Returns:
        [channels] each, float64.
    """
    mean = mean.double()
    low, high = _in_float64(low, high)
    # Where gamma is 0 the channel is constant: a tiny deviation avoids 0 / 0 for a mean that lies on a bound.
    std = std.double().clamp(min=1e-30)
    a = (low - mean) / std
    b = (high - mean) / std
    below = ndtr(a)  # P(a)
    above = ndtr(-b)  # 1 - P(b)
    inside = (1 - below - above).clamp(min=0)
    p_a = _normal_density(a)
    p_b = _normal_density(b)
    # An infinite bound is never reached: its probability is 0, and so is its term.
    low_times = torch.where(torch.isfinite(low), low, 0.0)
    high_times = torch.where(torch.isfinite(high), high, 0.0)
    first = low_times * below + high_times * above + mean * inside + std * (p_a - p_b)
    # The second moment of the same integral. z^2 p(z) integrates to P(z) - z p(z), which gives the terms at both edges.
    edges = std * ((low_times + mean) * p_a - (high_times + mean) * p_b)
    second = low_times**2 * below + high_times**2 * above + (mean**2 + std**2) * inside + edges
    # E[y^2] - E[y]^2 of nearly constant values may come out slightly negative.
    return first, (second - first**2).clamp(min=0).sqrt()


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _in_float64(*bounds: Bound) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(bound).detach().double().cpu() for bound in bounds)


def after_clip(x: Distribution, low: Bound, high: Bound) -> Distribution:
    """Return the distribution after clip(x, low, high), with bounds that are numbers or [channels]."""
    low, high = _in_float64(low, high)
    mean, std = clipped_moments(x.mean, x.std, low, high)
    return replace(x, mean=mean, std=std, low=x.low.clamp(low, high), high=x.high.clamp(low, high))


def after_function(x: Distribution, function: Callable[[Tensor], Tensor]) -> Distribution:
    """Return the distribution after an elementwise function of [points, channels], by quadrature."""
    reach = QUADRATURE_DEVIATIONS
    z = torch.linspace(-reach, reach, QUADRATURE_POINTS, dtype=torch.float64)[:, None]  # [points, 1]
    # Divided by their sum, the weights are those of a distribution, so that constants are integrated exactly.
    weight = _normal_density(z) / _normal_density(z).sum()
    y = function(x.mean + x.std * z)  # [points, channels]
    mean = (weight * y).sum(0)
    std = (weight * (y - mean) ** 2).sum(0).sqrt()
    fraction = torch.linspace(0, 1, QUADRATURE_POINTS, dtype=torch.float64)[:, None]  # [points, 1]
    # A function such as SiLU has its minimum inside of the range, so both ends are not enough.
    extent = function(x.low + (x.high - x.low) * fraction)
    return replace(x, mean=mean, std=std, low=extent.amin(0), high=extent.amax(0))


def after_sum(a: Distribution, b: Distribution, alpha: float) -> Distribution:
    """Return the distribution of the sum of independent tensors.

    Its extent is `alpha` standard deviations on both sides, as of a Gaussian. Rectified tensors have longer tails: the
    terms' own distances from the mean, added as standard deviations are, are used where they reach further. Neither
    goes beyond the sum of the terms' ends.
    """
    a, b = aligned(a, b)
    mean = a.mean + b.mean
    # Variances of independent terms add up: sqrt(std_a^2 + std_b^2).
    std = torch.hypot(a.std, b.std)
    below = torch.maximum(alpha * std, torch.hypot(a.mean - a.low, b.mean - b.low))
    above = torch.maximum(alpha * std, torch.hypot(a.high - a.mean, b.high - b.mean))
    # No sum leaves the interval between the sums of the ends.
    low = torch.maximum(mean - below, a.low + b.low)
    high = torch.minimum(mean + above, a.high + b.high)
    return Distribution(mean, std, low, high, _common_axis(a, b), a.measured and b.measured)


def multiplied(a: Distribution, b: Distribution) -> Distribution:
    """Return the distribution of the product of independent tensors.

    Its extent is the product of the factors' extents, because products have long tails.
    """
    a, b = aligned(a, b)
    # Var[a b] of independent factors
    variance = a.std**2 * b.std**2 + a.std**2 * b.mean**2 + b.std**2 * a.mean**2
    # Of two intervals, the product has its extremes at the corners, whatever the signs.
    corners = torch.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
    return Distribution(
        a.mean * b.mean,
        variance.sqrt(),
        corners.amin(0),
        corners.amax(0),
        _common_axis(a, b),
        a.measured and b.measured,
    )


def constant_distribution(value: float | Tensor) -> Distribution:
    """Return the distribution of a number, or of all elements of a tensor, as one channel."""
    values = torch.as_tensor(value).detach().double().cpu().reshape(1, -1)
    return Distribution(values.mean(1), values.std(1, correction=0), values.amin(1), values.amax(1))


def after_scaling(x: Distribution, factor: float) -> Distribution:
    """Return the distribution of a tensor times a number."""
    ends = torch.stack([x.low * factor, x.high * factor])
    return replace(x, mean=x.mean * factor, std=x.std * abs(factor), low=ends.amin(0), high=ends.amax(0))


def after_concatenation(parts: Sequence[Distribution], axis: int | None) -> Distribution:
    """Return the distribution of tensors that are concatenated along their channel axis, `axis`."""
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std", "low", "high")}
    return Distribution(**fields, axis=axis, measured=all(part.measured for part in parts))


def collapsed(x: Distribution) -> Distribution:
    """Return the mixture of all channels as one channel, for operators that mix the channels."""
    mean = x.mean.mean(0, keepdim=True)
    # The variance of a mixture: the mean of E[x^2] over the channels, less the square of the common mean.
    std = (x.std**2 + x.mean**2).mean(0, keepdim=True) - mean**2
    low = x.low.amin(0, keepdim=True)
    high = x.high.amax(0, keepdim=True)
    return Distribution(mean, std.clamp(min=0).sqrt(), low, high, None, x.measured)


def aligned(a: Distribution, b: Distribution) -> tuple[Distribution, Distribution]:
    """Return both with the same channels; where their channel axes or numbers differ, each as one channel."""
    if a.axis is None or b.axis is None:
        return a, b
    return (a, b) if (a.axis, len(a.mean)) == (b.axis, len(b.mean)) else (collapsed(a), collapsed(b))


def _common_axis(a: Distribution, b: Distribution) -> int | None:
    return b.axis if a.axis is None else a.axis
