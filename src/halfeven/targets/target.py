"""A runtime's rules for the placement of quantizers, as data."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import kind_of

K = OperatorKind


class GridRequirement(enum.Enum):
    """An operator's requirement on the integers that it reads."""

    ANY = "any zero point"
    NO_ZERO_POINT = "no zero point"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The operators that a runtime executes in integers, and where it wants quantizers.

    `inputs` names the kinds that take integers; placement quantizes their inputs at the operators that produce them.
    Additions and multiplications of tensors are a case of their own: they are quantized where a convolution leads to
    them, as in the residual blocks and gates of convolutional networks, and stay in float in transformers. No field
    has a default: each rule of a runtime stands in its row.
    """

    name: str
    """The runtime's name, as users write it."""
    weight_bits: range
    """Bits of the weights that it multiplies as integers."""
    activation_bits: range
    """Bits of the activations that it multiplies as integers."""
    inputs: Mapping[OperatorKind, Callable[[fx.Node], GridRequirement]]
    """Kinds that read integers, each with the grid that an operator of it asks for."""
    stays_in_float: Callable[[fx.Node], str | None]
    """Reason why a layer of one of these kinds computes in float all the same, to be read behind the runtime's name:
    there is no integer kernel for its shape, or a slower one. None for all others."""
    elementwise: frozenset[OperatorKind]
    """Kinds that combine two tensors in integers."""
    outputs: frozenset[OperatorKind]
    """Kinds that run in integers only where their own result is quantized, whoever reads it."""
    residual_branch_in_float: bool
    """A convolution that is added to a skip connection stays unquantized: it is fused with the addition."""
    rounds_average: Callable[[fx.Node], bool]
    """True for an average of integers that the runtime rounds, because a reader of it computes with bytes."""
    fuses_any_activation: bool
    """Any activation is computed in the kernel before it; else only one that clips, which the rounding takes in."""
    stored_weights: Mapping[OperatorKind, tuple[int, ...]]
    """Kinds whose weights alone may be integers, and of how many bits: the kernel makes floats of them as it reads."""
    grids: frozenset[tuple[bool, bool]]
    """Activations' grids that it computes with, as (signed, symmetric)."""
    signed_only: bool
    """Activations are signed without a zero point, also after a ReLU."""
    multiplies_gates: bool
    """SiLU and hard-swish are faster as products of integers than in float."""
    int32_bias: bool
    """Biases are 32-bit integers on the grid of the layer's products."""


ALL_GRIDS = frozenset({(True, True), (True, False), (False, True), (False, False)})
"""Signed and unsigned integers, with and without a zero point."""


def any_grid(node: fx.Node) -> GridRequirement:
    """Take any integers, whatever the operator."""
    return GridRequirement.ANY


def no_zero_point(node: fx.Node) -> GridRequirement:
    """Take integers without a zero point, whatever the operator."""
    return GridRequirement.NO_ZERO_POINT


def never(node: fx.Node) -> bool:
    """Return False for every operator."""
    return False


def nowhere(node: fx.Node) -> None:
    """Give no reason: layers of all shapes have integer kernels."""


def wanted_grid(target: Target, node: fx.Node) -> GridRequirement | None:
    """Return the grid on which the operator takes its inputs; None where it computes in float."""
    rule = target.inputs.get(kind_of(node))
    return None if rule is None or target.stays_in_float(node) is not None else rule(node)
