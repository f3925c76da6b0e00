"""Choose the grid of an activation: the target's usual one, or what a rule sets, where the target computes with it."""

from collections.abc import Iterable, Mapping

from torch import fx

from halfeven.errors import PlacementError, named
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, kind_of
from halfeven.placement.options import QuantizationOptions
from halfeven.placement.plan import PlannedTensor
from halfeven.placement.requests import Region
from halfeven.placement.rules import RuleBook
from halfeven.quantization.scheme import Scheme
from halfeven.targets.target import GridRequirement, Target


def activation_scheme(
    region: Region,
    places: list[fx.Node],
    rules: RuleBook,
    fused: Mapping[str, OperatorKind],
    target: Target,
    bits: int,
) -> Scheme:
    """Return the grid of a quantized activation.

    Args:
        region: the graph, with its requests.
        places: the tensors that share the quantizer.
        rules: the user's rules.
        fused: the operators by which a rule may name the quantizer.
        target: the runtime.
        bits: the scheme's width.

    Raises:
        PlacementError: a rule sets a grid that the target, a reader or the tensor's values cannot have.
    """
    non_negative = all(Op(node).is_non_negative for node in places)
    no_zero_point = any(region.requests[node].grid is GridRequirement.NO_ZERO_POINT for node in places)
    usual = _usual_grid(target, non_negative=non_negative, no_zero_point=no_zero_point)
    symmetric = rules.chosen("symmetric", fused, usual.symmetric)
    # The usual sign belongs to the usual zero point. Where a rule changes the zero point, the values decide on the
    # sign.
    if symmetric == usual.symmetric:
        signed = rules.chosen("signed", fused, usual.signed)
    else:  # an unsigned grid without a zero point has no negative numbers
        signed = rules.chosen("signed", fused, target.signed_only or (symmetric and not non_negative))
    scheme = Scheme(
        bits=rules.chosen("activation_bits", fused, bits),
        signed=signed,
        symmetric=symmetric,
        power_of_two=rules.chosen("power_of_two", fused, False),
    )
    name = " = ".join(region.names[node] for node in places)
    if reason := _reason_against(scheme, target, non_negative=non_negative, no_zero_point=no_zero_point):
        raise PlacementError(
            f"A rule puts {name} on the grid {scheme}, and {reason}. Change the rule's symmetric and signed, or leave "
            "them out: the plan then chooses a grid that can be run."
        )
    return scheme


def _usual_grid(target: Target, *, non_negative: bool, no_zero_point: bool) -> Scheme:
    if target.signed_only:
        return Scheme(signed=True, symmetric=True)
    if non_negative:
        # White paper, section 2.2: an unsigned symmetric grid suits one-tailed values, such as those after a ReLU.
        return Scheme(signed=False, symmetric=True)
    # Values of both signs: unsigned with a zero point, so that the grid is exactly the range, unless a reader takes no
    # zero point.
    return Scheme(signed=no_zero_point, symmetric=no_zero_point)


def _reason_against(scheme: Scheme, target: Target, *, non_negative: bool, no_zero_point: bool) -> str | None:
    """Return the reason against a grid, or None."""
    if scheme.symmetric and not scheme.signed and not non_negative:
        return "the tensor has negative values, all of which an unsigned grid without a zero point would clip to 0"
    if (scheme.signed, scheme.symmetric) not in target.grids:
        return f"{target.name} has no integers of this kind"
    if no_zero_point and not scheme.symmetric:
        return f"an operator that reads it computes in {target.name} without a zero point only; with one it is in float"
    return None


def simulated_alone(tensors: Iterable[PlannedTensor], target: Target) -> tuple[str, ...]:
    """Return the names of activations with more bits than the target runs, with their bits."""
    wide = [tensor for tensor in tensors if tensor.scheme.bits > max(target.activation_bits)]
    return tuple(f"{' = '.join(tensor.places)} ({tensor.scheme.bits} bits)" for tensor in wide)


def check_deployable(tensors: Iterable[PlannedTensor], target: Target) -> None:
    """Refuse to write a model with activations that can only be simulated.

    Raises:
        PlacementError: an activation has more bits than the target runs.
    """
    if wide := simulated_alone(tensors, target):
        raise PlacementError(
            f"{named(wide)} can only be simulated: {target.name} has activations of at most "
            f"{max(target.activation_bits)} bits, so no file could compute what this model does. Give them at most "
            "that many bits, or leave their readers in float (quantize=False), by halfeven.set_rules."
        )


def check_power_of_two(name: str, kinds: list[OperatorKind], options: QuantizationOptions) -> None:
    """Refuse power-of-two scales for a weight that a live BatchNorm multiplies at export.

    Args:
        name: the layer.
        kinds: the kinds of the operators that are fused behind it.
        options: the options of the plan.

    Raises:
        PlacementError: the scales in the file would be no powers of two.
    """
    if OperatorKind.BATCH_NORM in kinds and options.batchnorm not in ("fold", "fold live"):
        raise PlacementError(
            f"A rule asks for power-of-two scales of the weight of {name}, and the live BatchNorm behind it multiplies "
            'them at export, so the file would have other scales. Set batchnorm="fold live" to train, or "fold".'
        )


def kinds_behind(node: fx.Node) -> list[OperatorKind]:
    """Return the kinds of the BatchNorm and activation that alone read a layer."""
    kinds = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if kind_of(node) not in (OperatorKind.BATCH_NORM, OperatorKind.ACTIVATION, OperatorKind.IDENTITY):
            break
        kinds.append(kind_of(node))
    return kinds
