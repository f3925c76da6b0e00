"""Look up the user's rules by operator."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from halfeven.errors import PlacementError
from halfeven.graph.operators import OperatorKind
from halfeven.nearest import similar
from halfeven.placement.options import Rule, rule_text

Choice = TypeVar("Choice")

LACKING_PARTS = {
    "weight_bits": "no quantized weight",
    "per_channel": "no quantized weight",
    "activation_bits": "no quantizer at its output",
    "symmetric": "no quantizer at its output",
    "signed": "no quantizer at its output",
    "observer": "no quantizer",
    "ranges": "no quantizer",
    "power_of_two": "no quantizer",
    "quantizer": "no quantizer",
}
"""Fields of a rule that need a quantizer -> what the operator lacks where such a field has no effect."""


class RuleBook:
    """The rules for the first and last layer, then the user's rules, with a record of the rules that took effect.

    A rule takes effect where any of its fields is looked up: `weight_bits` of a layer whose weight is quantized,
    `activation_bits` of a tensor with a quantizer, `quantize` of any operator. For each field the last rule wins.
    """

    def __init__(self, rules: tuple[Rule, ...], ends: tuple[Rule, ...] = ()) -> None:
        self.rules = (*ends, *rules)
        self.used = set(range(len(ends)))  # only the user's rules must take effect
        self.matched: dict[int, str] = {}
        kinds = {kind.value for kind in OperatorKind}
        for rule in rules:
            if rule.kind is not None and rule.kind not in kinds:
                raise PlacementError(
                    f'The rule {rule_text(vars(rule))} names the operator kind "{rule.kind}", which does not exist, so '
                    f"it would do nothing. Choose one of: {', '.join(sorted(kinds))}."
                )

    def quantizes(self, name: str, kind: OperatorKind, default: bool = True) -> bool:
        """Return True if an operator computes in integers where it can.

        Args:
            name: name of the operator.
            kind: kind of the operator.
            default: the answer if no rule holds for it.
        """
        return self.chosen("quantize", {name: kind}, default)

    def chosen(self, field: str, operators: Mapping[str, OperatorKind], default: Choice) -> Choice:
        """Return the value that the rules set for a weight or an activation.

        Args:
            field: the field of `Rule`.
            operators: the kinds, by name, of the operators by any of which a rule may name it.
            default: the value if no rule sets the field.
        """
        # The list reads all rules, not only the last: each that holds has taken effect.
        found: Choice = [default, *self._values_given(field, operators)][-1]
        return found

    def _values_given(self, part: str, operators: Mapping[str, OperatorKind]) -> Iterator[Any]:
        for index, rule in enumerate(self.rules):
            # `matched` is for the message of `check_all_used` alone: a rule may hold for an operator that lacks the
            # part which its fields set.
            names = [name for name, kind in operators.items() if _rule_holds(rule, name, kind)]
            if names:
                self.matched.setdefault(index, names[0])
            if names and (value := getattr(rule, part)) is not None:
                self.used.add(index)
                yield value

    def check_all_used(self, names: list[str]) -> None:
        """Raise PlacementError for a rule without effect: it is a mistake that the user would not notice."""
        for index, rule in enumerate(self.rules):
            if index not in self.used:
                raise PlacementError(f"The rule {rule_text(vars(rule))} {self._why_without_effect(index, rule, names)}")

    def _why_without_effect(self, index: int, rule: Rule, names: list[str]) -> str:
        """Return why a rule has no effect, and the remedy."""
        lacks = dict.fromkeys(what for part, what in LACKING_PARTS.items() if getattr(rule, part) is not None)
        if not lacks and rule.quantize is None:
            return (
                f"sets none of {', '.join(LACKING_PARTS)} and quantize, so it would do nothing. Set at least one of "
                "these fields, or leave the rule out."
            )
        if index in self.matched:
            return (
                f'matches "{self.matched[index]}", which has {" and ".join(lacks)}, so it would do nothing. The plan '
                "without the rule (halfeven.plan_of) lists what is quantized, and why the rest is not."
            )
        near = similar(rule.pattern, names, 3, cutoff=0.4)
        hint = f" The nearest names are {', '.join(near)}." if near else ""
        if any(name.startswith(f"{rule.pattern}.") for name in names):
            hint = f' It names a module: write "{rule.pattern}.*" for all operators in it.'
        return (
            f"holds for no operator of this model, so it would do nothing.{hint} Correct its pattern, or leave the "
            "rule out."
        )


def _rule_holds(rule: Rule, name: str, kind: OperatorKind) -> bool:
    return rule.kind in (None, kind.value) and fnmatch.fnmatchcase(name, rule.pattern)
