"""The search for the range with the least error among candidates."""

from collections.abc import Callable

import torch
from torch import Tensor

CANDIDATES = 100
"""Number of candidate extents where both ends of a range shrink together."""

COARSE_CANDIDATES = 20
"""Number of candidate extents of each end where the ends shrink independently."""

Errors = Callable[[Tensor, Tensor], Tensor]
"""A function of the ends of candidate ranges, (low, high), each [candidates, channels], that returns the errors of
these ranges, [candidates, channels]."""


def least_error(errors: Errors, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the ends of the range with the least error, [channels] each.

    Both ends shrink together, down to a hundredth. Where the grid is not symmetric they also shrink independently, in
    coarse steps, and each end is then refined in turn.

    Args:
        errors: the error of candidate ranges.
        low, high: extremes of the values of each channel, [channels].
        symmetric: True for a grid that is symmetric about zero.
    """
    device = low.device
    fractions = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES, device=device)[:, None]
    if symmetric:
        return best_range(errors, low * fractions, high * fractions)
    coarse = torch.linspace(1.0, 1.0 / COARSE_CANDIDATES, COARSE_CANDIDATES, device=device)
    # The pairs of equal fractions come first, from the whole range down: of equal errors the widest range wins.
    pairs = torch.cat([fractions.expand(-1, 2), torch.cartesian_prod(coarse, coarse)])
    low, high = best_range(errors, low * pairs[:, :1], high * pairs[:, 1:])
    # Factors from 1/2 to 3/2; the factor 1 comes first, so that the present range wins a tie.
    around = torch.cat([torch.ones_like(fractions[:1]), 0.5 + fractions])
    for _ in range(2):  # near the optimum each end's best value hardly depends on the other end: two turns are enough
        low, high = best_range(errors, low * around, high.expand(len(around), -1))
        low, high = best_range(errors, low.expand(len(around), -1), high * around)
    return low, high


def best_range(errors: Errors, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each channel, the ends of the candidate with the least error, [channels] each; the first wins a tie.

    Args:
        errors: the error of candidate ranges.
        lows, highs: ends of the candidates, [candidates, channels].
    """
    chosen = errors(lows, highs).argmin(0, keepdim=True)
    return lows.gather(0, chosen)[0], highs.gather(0, chosen)[0]


def by_parts(errors: Errors, size: int) -> Errors:
    """Return a function of the same errors that computes at most `size` candidates at a time, to bound the memory."""

    def parts(lows: Tensor, highs: Tensor) -> Tensor:
        pairs = zip(torch.split(lows, size), torch.split(highs, size), strict=True)
        return torch.cat([errors(low, high) for low, high in pairs])

    return parts
