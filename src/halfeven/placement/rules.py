"""Look up the user's rules by operator."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from halfeven.errors import PlacementError
from halfeven.graph.operators import OperatorKind
from halfeven.nearest import similar
from halfeven.placement.options import Rule


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
                    f'The rule {rule} names the operator kind "{rule.kind}", which does not exist, so it would do '
                    f"nothing. Choose one of: {', '.join(sorted(kinds))}."
                )

    def quantizes(self, name: str, kind: OperatorKind) -> bool:
        """Return True if an operator computes in integers where it can."""
        return bool([True, *self._said("quantize", {name: kind})][-1])

    def weight_bits(self, name: str, kind: OperatorKind, default: int) -> int:
        """Return the bits of a layer's quantized weight."""
        return int([default, *self._said("weight_bits", {name: kind})][-1])

    def activation_bits(self, operators: Mapping[str, OperatorKind], default: int) -> int:
        """Return the bits of a quantizer.

        Args:
            operators: the kinds, by name, of the operators by any of which a rule may name the quantizer.
            default: the bits if no rule sets them.
        """
        return int([default, *self._said("activation_bits", operators)][-1])

    def observer(self, operators: Mapping[str, OperatorKind], default: str) -> str:
        """Return the range estimator of a weight or an activation.

        Args:
            operators: the kinds, by name, of the operators by any of which a rule may name the quantizer.
            default: the estimator if no rule sets it.
        """
        return str([default, *self._said("observer", operators)][-1])

    def _said(self, part: str, operators: Mapping[str, OperatorKind]) -> Iterator[Any]:
        for index, rule in enumerate(self.rules):
            names = [name for name, kind in operators.items() if _holds(rule, name, kind)]
            if names:
                self.matched.setdefault(index, names[0])
            if names and (value := getattr(rule, part)) is not None:
                self.used.add(index)
                yield value

    def check_all_used(self, names: list[str]) -> None:
        """Raise PlacementError for a rule without effect: it is a mistake that the user would not notice."""
        for index, rule in enumerate(self.rules):
            if index not in self.used:
                raise PlacementError(f"The rule {rule} {self._why(index, rule, names)}")

    def _why(self, index: int, rule: Rule, names: list[str]) -> str:
        lacking = {
            "weight_bits": "no quantized weight",
            "activation_bits": "no quantizer at its output",
            "observer": "no quantizer",
        }
        lacks = [what for part, what in lacking.items() if getattr(rule, part) is not None]
        if not lacks and rule.quantize is None:
            return (
                "sets neither bits nor observer nor quantize, so it would do nothing. Set at least one of these "
                "fields, or leave the rule out."
            )
        if index in self.matched:
            return (
                f'matches "{self.matched[index]}", which has {" and ".join(lacks)}, so it would do nothing. The plan '
                "without the rule (halfeven.plan_of) lists what is quantized, and why the rest is not."
            )
        near = similar(rule.pattern, names, 3, cutoff=0.4)
        hint = f" The nearest names are {', '.join(near)}." if near else ""
        return (
            f"holds for no operator of this model, so it would do nothing.{hint} Correct its pattern, or leave the "
            "rule out."
        )


def _holds(rule: Rule, name: str, kind: OperatorKind) -> bool:
    return rule.kind in (None, kind.value) and fnmatch.fnmatchcase(name, rule.pattern)
