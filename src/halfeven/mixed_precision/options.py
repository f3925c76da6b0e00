"""Define the budgets of a search for the cheapest plan."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from halfeven.diagnosis.sensitivity import RANKING_SAMPLES
from halfeven.options import NonNegativeFloat, NonNegativeInt, Options, PositiveFloat, PositiveInt

CostName = Literal["auto", "latency", "bops", "size"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Budgets of a search for the cheapest plan, and how it measures. A search needs at least one budget."""

    max_drop: NonNegativeFloat | None = None
    """Largest drop from the float model, in the metric's unit; without a metric, the largest percentage of answers that
    differ from the float model's, or 100 times the divergence of outputs that are no class scores."""
    latency: PositiveFloat | None = None
    """Largest latency of the file in the target, on the first calibration batch, as a ratio to the float file in the
    runtime's default precision."""
    bits: PositiveFloat | None = None
    """Largest mean of the bits that are multiplied, over the multiply-accumulates; float counts as 32."""
    tensors: NonNegativeInt | None = None
    """Largest number of activations that leave the bits of the scheme."""
    cost: CostName = "auto"
    """Cost that a step is weighed by: "latency", the time in the target; "bops", bits times bits of the
    multiply-accumulates, with the traffic of activations; "size", the size of the weights; "auto": the cost that has a
    budget, or else "bops", and "size" where the scheme quantizes weights alone."""
    samples: PositiveInt = RANKING_SAMPLES
    """Samples that rank the steps."""
    rescorings: NonNegativeInt = 1
    """Number of times that the steps are ranked anew, after 4, 8, 16, ... steps."""


class SearchFields(TypedDict, total=False):
    """The fields of `SearchOptions` as keyword arguments, for type checkers."""

    max_drop: float | None
    latency: float | None
    bits: float | None
    tensors: int | None
    cost: CostName
    samples: int
    rescorings: int
