"""Groups of operators that could run in float together, and the quantizers that this would take away."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from halfeven.diagnosis.exchanged_ranges import planned_quantizers
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.options import Rule
from halfeven.placement.plan import PlannedWeight
from halfeven.quantization.quantizer import Quantizer

LARGEST_SHARE = 0.6
"""Largest share of a model's integer operators in a group: more is no exception."""
NEIGHBOURS = (2, 3)
"""Numbers of operators in a row that make a group, anywhere in a model of at most `MAX_WINDOWED` operators."""
MAX_WINDOWED = 40
GROUP_NAME_DEPTH = 3
"""Number of leading parts of a name, "layers.0.attention", that make a group."""


@dataclass(frozen=True)
class OperatorGroup:
    """Operators of a model that could run in float together."""

    name: str
    operators: tuple[str, ...]
    """Names of the operators that compute in integers, in the order of the graph."""
    quantizers: tuple[Quantizer, ...]
    """Their weights', and those of the activations that no other operator reads."""
    leading: bool
    """The operators are the first of the model."""
    rules: tuple[Rule, ...]
    """Leave them in float."""


def integer_operators(qmodel: nn.Module) -> list[str]:
    """Return the names of the operators that read integers, in the order of the graph."""
    plan = plan_of(qmodel)
    reading = {name for tensor in plan.tensors for name in tensor.consumers} | {w.name for w in plan.weights}
    return [name for name in named_nodes(qmodel) if name in reading]


def operator_groups(qmodel: nn.Module) -> list[OperatorGroup]:
    """Return groups of neighbours: the first 2, 3, 4, 6, ... operators, the operators of each submodule, and in small
    models any 2 or 3 in a row."""
    operators = integer_operators(qmodel)
    largest = int(LARGEST_SHARE * len(operators))
    # About half as large again each time: a front end has some length, and every length would cost a measurement.
    sizes = [size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32) if size <= largest]
    found = {tuple(operators[:size]): f"the first {size} operators" for size in sizes}
    for name, members in _by_module(operators).items():
        if 2 <= len(members) <= max(largest, 1):
            found.setdefault(tuple(members), name)
    for size in NEIGHBOURS if len(operators) <= MAX_WINDOWED else ():
        for start in range(len(operators) - size + 1 if size <= largest else 0):
            members = operators[start : start + size]
            found.setdefault(tuple(members), " and ".join(members))
    return [group_of(qmodel, operators, members, name) for members, name in found.items()]


def group_of(qmodel: nn.Module, operators: Sequence[str], members: Sequence[str], name: str) -> OperatorGroup:
    """Return the group of these operators.

    Args:
        qmodel: the model.
        operators: all of `integer_operators`.
        members: the operators of the group.
        name: of the group.
    """
    inside = set(members)
    # An activation stays quantized while any operator outside of the group reads it.
    taken = [
        q
        for q, planned in planned_quantizers(qmodel)
        if (planned.name in inside if isinstance(planned, PlannedWeight) else inside.issuperset(planned.consumers))
    ]
    leading = list(members) == list(operators[: len(members)])
    return OperatorGroup(name, tuple(members), tuple(taken), leading, float_rules(members, operators))


def float_rules(members: Sequence[str], operators: Sequence[str]) -> tuple[Rule, ...]:
    """Return rules that leave operators in float: a single one where they are all those of a submodule."""
    inside = set(members)
    for path, group in _by_module(operators).items():
        if set(group) == inside and len(inside) > 1:
            return (Rule(pattern=f"{glob.escape(path)}.*", quantize=False),)
    return tuple(Rule(pattern=glob.escape(name), quantize=False) for name in members)


def _by_module(operators: Sequence[str]) -> Mapping[str, list[str]]:
    """Return the operators inside of each submodule that leads to their names, by its path."""
    found: dict[str, list[str]] = {}
    for name in operators:
        parts = name.split(".")
        for depth in range(1, min(len(parts), GROUP_NAME_DEPTH + 1)):
            found.setdefault(".".join(parts[:depth]), []).append(name)
    return found
