"""Price plans in the unit of the budget, and weigh the gain of a step against the cost that it adds."""

from halfeven.mixed_precision.cost import Cost
from halfeven.mixed_precision.options import SearchOptions

NEXT_TO_NOTHING = 0.01
"""Share of the damage at the start that is not worth a step."""


def is_worth_its_work(options: SearchOptions, before: Cost, cost: Cost, gain: float) -> bool:
    """Return False for a step that adds work which no budget counts, and gains next to nothing.

    Args:
        options: of the search.
        before: the cost without the step.
        cost: the cost with it.
        gain: the share of the damage at the start that it takes away.
    """
    free = price(options, cost) <= price(options, before) and cost.work > before.work
    return not free or gain > NEXT_TO_NOTHING


def price(options: SearchOptions, cost: Cost) -> float:
    """Return the cost that steps are weighed by."""
    # The user's `cost` comes first. Under "auto" it is the cost with a budget: latency before tensors before bits, and
    # work where only the drop has one.
    if options.cost == "auto" and options.tensors is not None and options.latency is None:
        return cost.tensors
    if options.cost == "size":
        return cost.size
    if options.cost == "bops":
        return cost.work
    timed = cost.latency is not None and (options.cost == "latency" or options.latency is not None)
    if timed and cost.latency is not None:
        return cost.latency
    return cost.bits if options.bits is not None and options.cost == "auto" else cost.work


def is_cheaper(options: SearchOptions, before: Cost, after: Cost) -> bool:
    """Return True if a step lowers the cost that steps are weighed by."""
    return price(options, after) < price(options, before)


def worth(options: SearchOptions, before: Cost, cost: Cost, gain: float, *, over: bool) -> tuple[float, float]:
    """Return the rank of a step, larger is better: steps that cost nothing, then by gain over added cost.

    Args:
        options: of the search.
        before: the cost without the step.
        cost: the cost with it.
        gain: what it takes away from the divergence.
        over: the plan is above a budget: the step that saves the most is first.
    """
    added = price(options, cost) - price(options, before)
    if over:
        return -added, gain
    return (1.0, gain) if added <= 0 else (0.0, gain / added)


def reason(options: SearchOptions, before: Cost, cost: Cost, gain: float) -> str:
    """Return why a step is taken, in words; `gain` is the share of the damage at the start."""
    said = f"gains {100 * gain:.1f} % of the damage"
    if is_cheaper(options, before, cost):
        return f"{said} and is cheaper"
    return f"{said} at no cost" if price(options, cost) == price(options, before) else said
