"""The remedies for a harmful tensor, cheapest first."""

import glob
from collections.abc import Sequence
from typing import get_args

from torch import nn

from halfeven.diagnosis.operator_groups import float_rules, integer_operators
from halfeven.diagnosis.trials import (
    EQUALIZE,
    EQUALIZE_ACROSS_CLIPS,
    REPARAMETRIZE,
    SMOOTH,
    Remedy,
    remedy_by_option,
    remedy_by_rules,
)
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.options import Rule
from halfeven.placement.plan import PlannedTensor, PlannedWeight
from halfeven.ptq.equalization.cross_layer import clips_between_layers
from halfeven.quantization.observers import ObserverName
from halfeven.runtimes.runtime import runtime_named

MORE_BITS = 8
UNEQUAL_CHANNEL_RATIO = 4.0
"""Channels whose magnitudes differ by less than this factor need no remedy of their own."""


def remedies(
    qmodel: nn.Module, planned: PlannedTensor | PlannedWeight, spread: float, input_spread: float = 1.0
) -> list[Remedy]:
    """Return the remedies to try for a tensor: another estimator, channels, more bits, float.

    Args:
        qmodel: the model.
        planned: the tensor's entry in the plan.
        spread: the largest channel's magnitude over the smallest's.
        input_spread: the same of the channels of a weight's input.
    """
    # In the order of their cost: the range, channels, bits, float. `try_remedies` takes the first that is nearly the
    # best.
    found = [*_observer_remedies(planned)]
    weight = isinstance(planned, PlannedWeight)
    if weight and planned.scheme.axis is None and spread >= UNEQUAL_CHANNEL_RATIO:
        rule = Rule(pattern=glob.escape(planned.name), per_channel=True)
        found += [remedy_by_rules("a scale per channel of this weight", [rule]), equalization(qmodel)]
    if (input_spread if weight else spread) >= UNEQUAL_CHANNEL_RATIO:
        found += [SMOOTH, REPARAMETRIZE, equalization(qmodel)]
    found += _bit_remedies(qmodel, planned)
    return [*found, *float_remedies(qmodel, planned)]


def equalization(qmodel: nn.Module) -> Remedy:
    """Return cross-layer equalization, with bounds by channel where ReLU6 or other clips stand between layers."""
    return EQUALIZE_ACROSS_CLIPS if clips_between_layers(qmodel) else EQUALIZE


def _observer_remedies(planned: PlannedTensor | PlannedWeight) -> list[Remedy]:
    """Return one remedy for each estimator of ranges that is not in use."""
    if isinstance(planned, PlannedTensor) and planned.fixed_range is not None:
        return []
    names = [name for name in get_args(ObserverName) if name not in (planned.observer, "moving_average")]
    place = planned.places[0] if isinstance(planned, PlannedTensor) else planned.name
    return [remedy_by_rules(f'estimator "{name}"', [Rule(pattern=glob.escape(place), observer=name)]) for name in names]


def estimators_everywhere(qmodel: nn.Module) -> list[Remedy]:
    """Return the remedies that give all activations the range of another estimator, the robust and the plain one."""
    plan = plan_of(qmodel)
    free = [tensor for tensor in plan.tensors if tensor.fixed_range is None]
    found = []
    for name in ("mse", "minmax"):
        others = [tensor for tensor in free if tensor.observer != name]
        # A rule wins over the option, so that the option would not reach the tensors whose observers rules have set.
        ruled = any(tensor.observer != plan.options.activation_observer for tensor in free)
        if others and ruled:
            rules = [Rule(pattern=glob.escape(tensor.places[0]), observer=name) for tensor in others]
            found.append(remedy_by_rules(f'estimator "{name}" for all activations', rules))
        elif others:
            found.append(remedy_by_option(f'estimator "{name}" for all activations', activation_observer=name))
    return found


def _bit_remedies(qmodel: nn.Module, planned: PlannedTensor | PlannedWeight) -> list[Remedy]:
    target = runtime_named(plan_of(qmodel).options.target).target
    if isinstance(planned, PlannedWeight):
        allowed = target.weight_bits
        rule = Rule(pattern=glob.escape(planned.name), weight_bits=MORE_BITS)
    else:
        allowed = target.activation_bits
        rule = Rule(pattern=glob.escape(planned.places[0]), activation_bits=MORE_BITS)
    return (
        [remedy_by_rules(f"{MORE_BITS} bits", [rule])]
        if planned.scheme.bits < MORE_BITS and MORE_BITS in allowed
        else []
    )


def float_remedies(qmodel: nn.Module, planned: PlannedTensor | PlannedWeight) -> list[Remedy]:
    """Return the ways to leave a tensor in float: its readers, what makes it, or both in float."""
    operators = integer_operators(qmodel)
    if isinstance(planned, PlannedWeight):
        return [remedy_by_rules(f"{planned.name} in float", float_rules([planned.name], operators))]
    known = named_nodes(qmodel)
    readers = [name for name in planned.consumers if name in known]
    makers = [name for name in planned.places if name in known]
    ways: Sequence[list[str]] = (readers, makers, [*readers, *makers])
    return [
        remedy_by_rules(f"{_shortened_names(members)} in float", float_rules(members, operators))
        for members in ways
        if members
    ]


def _shortened_names(operators: Sequence[str]) -> str:
    more = f" and {len(operators) - 2} more" if len(operators) > 2 else ""
    return ", ".join(operators[:2]) + more
