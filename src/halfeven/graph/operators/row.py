"""Define the row of an operator: its kind, its facts and the rules for its axes."""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Arguments = dict[str, Any]
"""The arguments of a call by the names of ATen's schema, defaults filled in."""

Interval = tuple[float, float]


class OperatorKind(enum.Enum):
    """The effect of an operator on the scales of its tensors."""

    CONVOLUTION = "convolution"
    TRANSPOSED_CONVOLUTION = "transposed convolution"
    LINEAR = "linear"
    MATMUL = "matrix product"
    BATCH_NORM = "batch normalization"
    ACTIVATION = "activation"
    ADD = "addition"
    MULTIPLY = "multiplication"
    CONCAT = "concatenation"
    AVERAGE = "average"
    SOFTMAX = "softmax"
    NORMALIZATION = "normalization"
    PAD = "padding"
    INTERPOLATION = "interpolation"
    SAME_SCALE = "same scale as its input"
    IDENTITY = "nothing in eval mode"
    INPUT = "input"
    CONSTANT = "constant"
    OUTPUT = "output"
    FLOAT = "not quantized"


K = OperatorKind
WEIGHTED = frozenset({K.CONVOLUTION, K.TRANSPOSED_CONVOLUTION, K.LINEAR})
"""Kinds with a weight that is quantized."""

TRANSPARENT = frozenset({K.SAME_SCALE, K.IDENTITY})
"""Kinds whose output lies on the grid of their first input."""

KERNEL_ROUNDED = frozenset({K.NORMALIZATION, K.BATCH_NORM, K.SOFTMAX, K.INTERPOLATION, K.AVERAGE, K.MATMUL})
"""Kinds whose last bits depend on the order in which a kernel adds."""


@dataclass(frozen=True)
class Call:
    """The call of an operator, as a rule sees it."""

    arguments: Arguments
    input_shape: tuple[Any, ...]
    """Shape of the first input tensor."""
    shape: tuple[Any, ...]
    """Shape of the result."""


AxisRule = Callable[[Call, int], int | None]
"""Maps the channels' axis before a call to the axis after it; None where the channels do not pass."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An overload of `torch.ops`, a Python function or a module type, and its facts.

    The defaults are cautious: nothing is known about the results, and no channel passes.
    """

    target: Any
    kind: OperatorKind
    module: type[nn.Module] | None = None
    """The standard module that capture builds for a call whose parameters belong to a module of the model."""
    bounds: Callable[[Arguments], tuple[Any, Any]] | None = None
    """For an operator that clips: returns the bounds (low, high) that the call gives, None for a missing bound."""
    results: Interval = (-math.inf, math.inf)
    """An interval that contains every result for every input."""
    homogeneous: bool = False
    """f(a * x) = a * f(x) for a > 0, elementwise and with at most one multiplication, whose result IEEE 754 fixes."""
    kernel_rounded: bool = False
    """The last bits of the result depend on the kernel's version, though the kind is not in `KERNEL_ROUNDED`."""
    factor_axis: AxisRule | None = None
    """The channels' axis after a call that a positive factor per channel passes through."""
    passes_features: Callable[[Call], bool] | None = None
    """Returns True for a call that keeps the last axis and passes a factor and an offset per channel of it."""
    pads_zeros: Callable[[Arguments], bool] | None = None
    """Returns True for a call that may put zeros beside the values of its input."""
    window: int = 0
    """Number of trailing axes that a pool or a resampling works along."""
    adaptive: bool = False
    """The window is computed from the sizes of input and output."""
    takes_maximum: bool = False
    """Each result is the largest value of a window, so that quantizing and clipping commute with the operator."""
    subtracts: bool = False
    """The second operand is subtracted."""
    splits: bool = False
    """The results are consecutive parts of the input along an axis."""
    training_flag: str | None = None
    """For a normalization with running statistics: the argument that is True in calls that use the batch's."""
    scatter: Any = None
    """For a view of a part of a tensor: the overload that returns the tensor with that part exchanged."""

    @property
    def has_kernel_rounding(self) -> bool:
        """Return True if the last bits of a result, computed in float, depend on the kernel's version."""
        # A clip or a ReLU selects numbers and rounds nothing, and a leaky ReLU rounds once, as IEEE 754 says; exp, erf
        # and their like are approximated, differently by each library.
        if self.kind is K.ACTIVATION:
            return self.bounds is None and not self.homogeneous
        return self.kernel_rounded or self.kind in KERNEL_ROUNDED


UNKNOWN = Operator(target=None, kind=K.FLOAT)
"""The row that stands for an operator without a row."""


# Rules for axes


def along_last_axes(count: int) -> AxisRule:
    """Return the rule of an operator on the last `count` axes of a tensor; the channels' axis must come before them."""
    return lambda call, axis: axis if axis < len(call.shape) - count else None


def any_axis(call: Call, axis: int) -> int:
    """Return the same axis: the rule of an elementwise operator."""
    return axis


def reduced_axis(call: Call, axis: int) -> int | None:
    """Return the axis after a mean or maximum over some axes; None if the channels' axis is reduced."""
    # No `dim` means all axes.
    ndim = len(call.input_shape)
    dims = {dim % ndim for dim in call.arguments["dim"] or range(ndim)}
    if axis in dims:
        return None
    # Without `keepdim` the reduced axes before the channels' are gone.
    return axis if call.arguments["keepdim"] else axis - sum(dim < axis for dim in dims)


def flattened_axis(call: Call, axis: int) -> int | None:
    """Return 1 for [batch, channels, ...] to [batch, features]: the features of a channel stay adjacent."""
    features = 1
    for size in call.input_shape[1:]:
        features = features * size
    return 1 if axis == 1 and len(call.shape) == 2 and call.shape[1] == features else None


def zero_padded_axis(call: Call, axis: int) -> int | None:
    """Return the same axis for a padding of other axes with zeros, or with values of the tensor itself."""
    # `pad` has two amounts for each axis, from the last axis backwards.
    padded = len(call.arguments["pad"]) // 2
    constant = call.arguments.get("mode", "constant") == "constant"
    # Reflection, replication and circular padding repeat the tensor's own values, which have its factors already.
    zero = not constant or call.arguments.get("value") in (None, 0)
    return axis if zero and axis < len(call.shape) - padded else None


# Rules for the last axis


def keeps_features(call: Call) -> bool:
    """Return True: the rule of an operator that copies."""
    return True


def keeps_last_size(call: Call) -> bool:
    """Return True for a reshape that keeps the size of the last axis."""
    return bool(call.shape[-1] == call.input_shape[-1])


def pads_nothing(call: Call) -> bool:
    """Return True for a padding by 0 elements; models that pad to a multiple make such calls for sizes that fit."""
    return all(isinstance(amount, int) and amount == 0 for amount in call.arguments["pad"])


def keeps_last_place(call: Call) -> bool:
    """Return True for a permutation that leaves the last axis in its place."""
    dims = call.arguments["dims"]
    return bool(dims[-1] % len(dims) == len(dims) - 1)


def on_other_axes(*arguments: str) -> Callable[[Call], bool]:
    """Return the rule of an operator on the axes that these arguments name; the last axis must not be among them."""

    def rule(call: Call) -> bool:
        last = len(call.input_shape) - 1
        given = [call.arguments[argument] for argument in arguments]
        dims = [dim for value in given for dim in (value if isinstance(value, list | tuple) else [value])]
        return bool(dims) and all(dim % len(call.input_shape) != last for dim in dims)

    return rule
