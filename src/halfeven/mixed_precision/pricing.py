"""Price plans in the unit of the budget, and weigh the gain of a step against the cost that it adds."""

from halfeven.mixed_precision.cost import Cost
from halfeven.mixed_precision.options import SearchOptions

NEXT_TO_NOTHING = 0.01
"""Share of the damage at the start that is not worth a step."""

BUDGETED_COSTS = ("bits", "tensors", "latency")
"""Costs that can have a budget, which is the option of the same name."""


def missed_budgets(options: SearchOptions, cost: Cost) -> tuple[str, ...]:
    """Return the names of the budgets that a plan of this cost does not keep; the drop is no cost."""
    values = ((name, getattr(cost, name), getattr(options, name)) for name in BUDGETED_COSTS)
    return tuple(name for name, value, budget in values if None not in (value, budget) and value > budget)


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
    """Return True if a step lowers the cost that steps are weighed by, or comes nearer to the budgets it must keep."""
    return added_price(options, before, after) < 0


def added_price(options: SearchOptions, before: Cost, after: Cost) -> float:
    """Return the price that a step adds.

    Where the plan before the step misses budgets, their costs are the price, whatever the user weighs steps by: each in
    units of its value before, since a share of time and a number of bits have no common unit.
    """
    if missed := missed_budgets(options, before):
        return float(sum(getattr(after, name) / getattr(before, name) - 1 for name in missed))
    return price(options, after) - price(options, before)


def worth(options: SearchOptions, before: Cost, cost: Cost, gain: float) -> tuple[float, float]:
    """Return the rank of a step, larger is better: steps that cost nothing, then by gain over added cost.

    Where the plan before the step misses a budget, the step that saves the most is first.

    Args:
        options: of the search.
        before: the cost without the step.
        cost: the cost with it.
        gain: what it takes away from the divergence.
    """
    added = added_price(options, before, cost)
    if missed_budgets(options, before):
        return -added, gain
    return (1.0, gain) if added <= 0 else (0.0, gain / added)


def reason(options: SearchOptions, before: Cost, cost: Cost, gain: float) -> str:
    """Return why a step is taken, in words; `gain` is the share of the damage at the start."""
    said = f"gains {100 * gain:.1f} % of the damage"
    if is_cheaper(options, before, cost):
        return f"{said} and is cheaper"
    return f"{said} at no cost" if price(options, cost) == price(options, before) else said
