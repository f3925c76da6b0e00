"""What a runtime asks of the placement of quantizers, as data."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from halfeven.graph.operators import OperatorKind, kind_of

K = OperatorKind


class Grid(enum.Enum):
    """What an operator asks of the integers that come in."""

    ANY = "any zero point"
    NO_ZERO_POINT = "no zero point"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a runtime executes in integers, and where it wants quantizers.

    `inputs` names the kinds that take integers; placement quantizes their inputs at the operators that produce them.
    Additions and multiplications of tensors are a case of their own: they are quantized where a convolution leads to
    them, as in the residual blocks and gates of convolutional networks, and stay in float in transformers.
    """

    name: str
    weight_bits: range
    activation_bits: range
    inputs: Mapping[OperatorKind, Callable[[fx.Node], Grid]]
    residual_branch_in_float: bool
    """A convolution that is added to a skip connection stays unquantized: it is fused with the addition."""
    elementwise: frozenset[OperatorKind] = field(default=frozenset({K.ADD}))
    """The kinds that combine two tensors in integers."""
    outputs: frozenset[OperatorKind] = frozenset()
    """Kinds that run in integers only where their own result is quantized, whoever reads it."""
    rounds_averages: bool = False
    """An average of integers is rounded where a sum, product or BatchNorm reads it as bytes."""
    fuses_any_activation: bool = True
    """Any activation is computed in the kernel before it; else only one that clips, which the rounding takes in."""
    stored_weights: Mapping[OperatorKind, tuple[int, ...]] = field(default_factory=dict)
    """Kinds whose weights alone may be integers, and of how many bits: the kernel makes floats of them as it reads."""
    signed_only: bool = False
    """Activations are signed without a zero point, also after a ReLU."""
    unsigned_only: bool = False
    """The runtime's integer kernels take unsigned activations; signed ones are written with a zero point of 128."""
    integer_bias: bool = False
    """Biases are 32-bit integers on the grid of the layer's products."""


def any_grid(node: fx.Node) -> Grid:
    return Grid.ANY


def no_zero_point(node: fx.Node) -> Grid:
    return Grid.NO_ZERO_POINT


def wanted_grid(target: Target, node: fx.Node) -> Grid | None:
    """The grid that the operator takes its inputs on; None where it computes in float."""
    rule = target.inputs.get(kind_of(node))
    return None if rule is None else rule(node)
