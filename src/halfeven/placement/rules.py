"""The user's rules, looked up by operator."""

import difflib
import fnmatch
from collections.abc import Mapping

from halfeven.errors import PlacementError
from halfeven.graph.operators import OperatorKind
from halfeven.placement.plan import Rule


class RuleBook:
    """The user's rules, and which of them held for something."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self.used: set[int] = set()
        kinds = {kind.value for kind in OperatorKind}
        for rule in rules:
            if rule.kind is not None and rule.kind not in kinds:
                raise PlacementError(
                    f'The rule {rule} names the operator kind "{rule.kind}", which does not exist. '
                    f"Choose one of: {', '.join(sorted(kinds))}."
                )

    def for_operator(self, name: str, kind: OperatorKind) -> Rule:
        """All rules that hold for an operator, merged; later ones win."""
        return self.for_any({name: kind})

    def for_any(self, operators: Mapping[str, OperatorKind]) -> Rule:
        """All rules that hold for any of the operators, by name, that share a quantizer, merged; later ones win."""
        weight_bits, activation_bits, quantize = None, None, True
        for index, rule in enumerate(self.rules):
            if not any(_holds(rule, name, kind) for name, kind in operators.items()):
                continue
            self.used.add(index)
            weight_bits = rule.weight_bits or weight_bits
            activation_bits = rule.activation_bits or activation_bits
            quantize = quantize if rule.quantize is None else rule.quantize
        return Rule(weight_bits=weight_bits, activation_bits=activation_bits, quantize=quantize)

    def check_all_used(self, names: list[str]) -> None:
        """Raise PlacementError for a rule that held for nothing: it is a mistake, and the user believes it works."""
        for index, rule in enumerate(self.rules):
            if index not in self.used:
                near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.4)
                hint = f" The nearest names are {', '.join(near)}." if near else ""
                raise PlacementError(
                    f"The rule {rule} holds for no operator of this model, so it would do nothing.{hint}"
                )


def _holds(rule: Rule, name: str, kind: OperatorKind) -> bool:
    return rule.kind in (None, kind.value) and fnmatch.fnmatchcase(name, rule.pattern)
