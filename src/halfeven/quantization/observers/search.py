"""Searching the range with the least error among candidates."""

from collections.abc import Callable

import torch
from torch import Tensor

CANDIDATES = 100
"""Extents that are tried for a range whose ends shrink together."""

COARSE = 20
"""Extents that are tried for each end where both are free."""

Errors = Callable[[Tensor, Tensor], Tensor]
"""From ends of ranges (low, high), each [candidates, channels], to the errors of these ranges, of the same shape."""


def least_error(errors: Errors, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The range with the least error, [channels] each, for channels that reach from `low` to `high`.

    Both ends shrink together, down to a hundredth. Where the grid is not symmetric, they also shrink independently of
    each other, in coarse steps, and each end is then refined in turn.
    """
    device = low.device
    fractions = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES, device=device)[:, None]
    if symmetric:
        return best(errors, low * fractions, high * fractions)
    coarse = torch.linspace(1.0, 1.0 / COARSE, COARSE, device=device)
    pairs = torch.cat([fractions.expand(-1, 2), torch.cartesian_prod(coarse, coarse)])
    low, high = best(errors, low * pairs[:, :1], high * pairs[:, 1:])
    # Factors from 1/2 to 3/2, the present value first so that it wins a tie.
    around = torch.cat([torch.ones_like(fractions[:1]), 0.5 + fractions])
    for _ in range(2):  # near the optimum that of one end moves little with the other: two turns settle it
        low, high = best(errors, low * around, high.expand(len(around), -1))
        low, high = best(errors, low.expand(len(around), -1), high * around)
    return low, high


def best(errors: Errors, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate with the least error, of [candidates, channels], chosen by channel; the first wins a tie."""
    chosen = errors(lows, highs).argmin(0, keepdim=True)
    return lows.gather(0, chosen)[0], highs.gather(0, chosen)[0]


def by_parts(errors: Errors, size: int) -> Errors:
    """The same errors, of at most `size` candidates at a time: memory stays bounded."""

    def parts(lows: Tensor, highs: Tensor) -> Tensor:
        pairs = zip(torch.split(lows, size), torch.split(highs, size), strict=True)
        return torch.cat([errors(low, high) for low, high in pairs])

    return parts
