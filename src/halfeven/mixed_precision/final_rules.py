"""The rules of the plan that a search ends with, from the moves that it took."""

import glob
from collections.abc import Sequence
from typing import Any

from halfeven.errors import PlacementError
from halfeven.mixed_precision.moves import Entry, Move, entries
from halfeven.placement.options import Rule
from halfeven.placement.plan import Plan, PlannedWeight, replaces


def final_rules(plan: Plan, taken: Sequence[Move]) -> tuple[Rule, ...]:
    """Return the rules that give each quantizer the grid of the last move on it.

    Args:
        plan: the plan without any move.
        taken: the moves in their order.
    """
    # Moves that later ones replace would become rules without effect, which a plan refuses.
    moves = _in_effect(taken)
    rules = _effective_rules(plan, list(dict.fromkeys(rule for move in moves for rule in move.rules)))
    if not rules:
        return ()
    wanted: dict[str, Entry] = {}
    for move in moves:
        described = entries(plan.with_rules(*move.rules))
        wanted |= {q.name: described[q.name] for q in move.settings if q.name in described}
    found = entries(plan.with_rules(*rules))
    # Fields of several moves meet in a quantizer: the bits of one, and the observer of an earlier one.
    further = [
        _rule_for(entry, found[name])
        for name, entry in wanted.items()
        if name in found and _grid_of(found[name]) != _grid_of(entry)
    ]
    return _without_replaced((*rules, *further))


def _without_replaced(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules without those whose fields a later rule of the same pattern sets again."""
    return tuple(
        rule for place, rule in enumerate(rules) if not any(replaces(later, rule) for later in rules[place + 1 :])
    )


def _grid_of(entry: Entry) -> tuple[object, ...]:
    return entry.scheme, entry.observer


def _rule_for(entry: Entry, present: Entry) -> Rule:
    """Return the rule that gives a quantizer its grid and observer where the other rules give it others."""
    is_weight = isinstance(entry, PlannedWeight)
    given: dict[str, Any] = {"weight_bits" if is_weight else "activation_bits": entry.scheme.bits}
    given["observer"] = entry.observer
    for name in ("symmetric", "signed", "power_of_two"):
        # A weight's grid has no choice of symmetry and sign, so it never differs in them.
        if getattr(entry.scheme, name) != getattr(present.scheme, name):
            given[name] = getattr(entry.scheme, name)
    if entry.scheme.axis != present.scheme.axis:
        given["per_channel"] = entry.scheme.axis is not None
    # A rule for one of the places of a tensor holds for all: they share the quantizer.
    place = entry.name if isinstance(entry, PlannedWeight) else entry.places[0]
    return Rule(pattern=glob.escape(place), **given)


def _in_effect(taken: Sequence[Move]) -> list[Move]:
    """Return the moves whose quantizers no later move sets again."""
    return [
        move
        for number, move in enumerate(taken)
        if not any(move.settings.keys() <= later.settings.keys() for later in taken[number + 1 :])
    ]


def _effective_rules(plan: Plan, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules without those that have no effect because others leave their operators in float."""
    in_float = [rule for rule in rules if rule.quantize is False]

    def changes(rule: Rule) -> bool:
        try:
            plan.with_rules(*in_float, rule)
        except PlacementError:
            return False
        return True

    return tuple(rule for rule in rules if not in_float or rule in in_float or changes(rule))
