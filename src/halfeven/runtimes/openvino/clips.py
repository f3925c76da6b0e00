"""Clips of integers, and of averages of integers, between two quantizers, as OpenVINO's CPU plugin computes them.

In the file a clip at both ends is an operator; a clamp is a maximum and a minimum, of which the converter makes that
operator where they stand side by side. Its bounds stop at whole bytes where it reads bytes, so where it is the first
behind them: what it returns counts as numbers. The last is left out where the quantizer behind clips as much or more.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.runtimes.openvino.exact_values import Average, Codes, FakeQuantizeRange, Scaled
from halfeven.runtimes.simulation import Simulated

aten = torch.ops.aten
CLAMPS = (aten.clamp.default, aten.clamp_min.default)


@dataclass(frozen=True)
class Step:
    """An operator of the file that clips."""

    low: float
    high: float
    half: bool = False
    """A maximum or a minimum; a ReLU is neither."""

    @property
    def has_both_ends(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


RELU = Step(0.0, math.inf)


@dataclass(frozen=True, eq=False)
class Clipped(Simulated):
    """Integers or averages behind clips, which depend on the quantizer that reads them."""

    source: Codes | Scaled | Average
    steps: tuple[Step, ...]

    def real(self) -> Tensor:
        clipped = _applied(self.source, _joined(self.steps), fused=False)
        return clipped if isinstance(clipped, Tensor) else clipped.real()


def clipped(x: Codes | Scaled | Average | Clipped, node: fx.Node, bounds: tuple[float, float]) -> Clipped:
    """Return a tensor behind a clip, an operator of the graph with these bounds."""
    found = _halves(bounds) if node.target in CLAMPS else (Step(*bounds),)
    return Clipped(x.source, x.steps + found) if isinstance(x, Clipped) else Clipped(x, found)


def read_by_quantizer(
    x: Codes | Scaled | Average | Clipped, limits: FakeQuantizeRange, own: tuple[float, float] | None
) -> Any:
    """Return a tensor as a quantizer reads it, whose own clip is that of a grid narrower than 8 bits."""
    source, steps = (x.source, x.steps) if isinstance(x, Clipped) else (x, ())
    found = _joined(steps + (_halves(own) if own is not None else ()))
    low, high = float(limits.low), float(limits.high)
    if found and found[-1] == RELU and low >= 0:  # the converter makes one operator of both
        found.pop()
    while found and found[-1].has_both_ends and found[-1].low <= low and high <= found[-1].high:
        found.pop()
    return _applied(source, found, fused=len(found) < 2)


def _halves(bounds: tuple[float, float]) -> tuple[Step, ...]:
    """Return the operators of a clamp."""
    low, high = bounds
    found = [Step(low, math.inf, half=True)] if math.isfinite(low) else []
    return (*found, *([Step(-math.inf, high, half=True)] if math.isfinite(high) else []))


def _joined(steps: tuple[Step, ...]) -> list[Step]:
    """Join each maximum and minimum that stand side by side, from the first on."""
    found: list[Step] = []
    for step in steps:
        last = found[-1] if found else None
        if last is not None and last.half and step.half and math.isfinite(last.low) != math.isfinite(step.low):
            low, high = max(last.low, step.low), min(last.high, step.high)
            if low <= high:
                found[-1] = Step(low, high)
                continue
        found.append(step)
    return found


def _applied(source: Codes | Scaled | Average, steps: list[Step], *, fused: bool) -> Any:
    """Apply clips; `fused`: a single one becomes a part of the kernel before, which does not round an average."""
    if not steps:
        return source
    x: Any = source.scaled if isinstance(source, Codes) else source
    if isinstance(x, Average) and not (fused and x.is_positive):
        x = x.rounded()
    rest = steps
    if isinstance(x, Scaled) and steps[0] == RELU and x.is_without_zero_point:
        # A ReLU of bytes without a zero point returns bytes: a clip behind it still stops at whole ones.
        x = x.clipped((0.0, math.inf))
        rest = steps[1:]
        if not rest:
            return x.real()
    if rest[0].has_both_ends:
        x = x.clipped((rest[0].low, rest[0].high))
        rest = rest[1:]
    for step in rest:
        x = (x if isinstance(x, Tensor) else x.real()).clamp(step.low, step.high)
    return x
