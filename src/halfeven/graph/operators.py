"""The table of operators: what each does to scales.

A row maps a module type or an ATen operator to its kind. Placement and algorithms speak of kinds only, so that a new
operator is a new row. Operators without a row run in float, and the plan says so.
"""

import enum
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.rebuild import arguments
from halfeven.graph.torch_private import AnyDropout, is_operator, short_name

aten = torch.ops.aten


class OperatorKind(enum.Enum):
    """What an operator does to the scales of its tensors."""

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

MODULES: dict[type[nn.Module], OperatorKind] = {
    nn.Conv1d: K.CONVOLUTION,
    nn.Conv2d: K.CONVOLUTION,
    nn.Conv3d: K.CONVOLUTION,
    nn.ConvTranspose1d: K.TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose2d: K.TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose3d: K.TRANSPOSED_CONVOLUTION,
    nn.Linear: K.LINEAR,
    nn.BatchNorm1d: K.BATCH_NORM,
    nn.BatchNorm2d: K.BATCH_NORM,
    nn.BatchNorm3d: K.BATCH_NORM,
    nn.SyncBatchNorm: K.BATCH_NORM,
    nn.LayerNorm: K.NORMALIZATION,
    nn.GroupNorm: K.NORMALIZATION,
    AnyDropout: K.IDENTITY,
    nn.Identity: K.IDENTITY,
}

FUNCTIONS: dict[Any, OperatorKind] = {
    aten.conv1d.default: K.CONVOLUTION,
    aten.conv2d.default: K.CONVOLUTION,
    aten.conv3d.default: K.CONVOLUTION,
    aten.conv1d.padding: K.CONVOLUTION,
    aten.conv2d.padding: K.CONVOLUTION,
    aten.conv3d.padding: K.CONVOLUTION,
    aten.conv_transpose1d.default: K.TRANSPOSED_CONVOLUTION,
    aten.conv_transpose2d.input: K.TRANSPOSED_CONVOLUTION,
    aten.conv_transpose3d.input: K.TRANSPOSED_CONVOLUTION,
    aten.linear.default: K.LINEAR,
    aten.matmul.default: K.MATMUL,
    aten.bmm.default: K.MATMUL,
    aten.add.Tensor: K.ADD,
    aten.sub.Tensor: K.ADD,
    aten.mul.Tensor: K.MULTIPLY,
    aten.cat.default: K.CONCAT,
    aten.mean.dim: K.AVERAGE,
    aten.mean.default: K.AVERAGE,
    aten.avg_pool1d.default: K.AVERAGE,
    aten.avg_pool2d.default: K.AVERAGE,
    aten.avg_pool3d.default: K.AVERAGE,
    aten.adaptive_avg_pool1d.default: K.AVERAGE,
    aten.adaptive_avg_pool2d.default: K.AVERAGE,
    aten.adaptive_avg_pool3d.default: K.AVERAGE,
    aten.softmax.int: K.SOFTMAX,
    aten._softmax.default: K.SOFTMAX,
    aten.layer_norm.default: K.NORMALIZATION,
    aten.group_norm.default: K.NORMALIZATION,
    aten.instance_norm.default: K.NORMALIZATION,
    aten.batch_norm.default: K.NORMALIZATION,
    aten.constant_pad_nd.default: K.PAD,
    aten.pad.default: K.PAD,
    aten.upsample_bilinear2d.vec: K.INTERPOLATION,
    aten.upsample_bicubic2d.vec: K.INTERPOLATION,
    **dict.fromkeys(
        (
            aten.relu.default,
            aten.relu6.default,
            aten.hardtanh.default,
            aten.clamp.default,
            aten.clamp_min.default,
            aten.leaky_relu.default,
            aten.prelu.default,
            aten.elu.default,
            aten.silu.default,
            aten.gelu.default,
            aten.mish.default,
            aten.softplus.default,
            aten.sigmoid.default,
            aten.hardsigmoid.default,
            aten.hardswish.default,
            aten.tanh.default,
        ),
        K.ACTIVATION,
    ),
    **dict.fromkeys(
        (
            operator.getitem,
            aten.view.default,
            aten.reshape.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.permute.default,
            aten.transpose.int,
            aten.t.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
            aten.unsqueeze.default,
            aten.expand.default,
            aten.slice.Tensor,
            aten.select.int,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.split.sizes,
            aten.chunk.default,
            aten.unbind.int,
            aten.narrow.default,
            aten.roll.default,
            aten.flip.default,
            aten.repeat.default,
            aten.index_select.default,
            aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default,
            aten.channel_shuffle.default,
            aten.max_pool1d.default,
            aten.max_pool2d.default,
            aten.max_pool3d.default,
            aten.adaptive_max_pool2d.default,
            aten.amax.default,
            aten.upsample_nearest2d.vec,
            aten.upsample_nearest2d.default,
        ),
        K.SAME_SCALE,
    ),
    **dict.fromkeys(
        (
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.dropout.default,
            aten.feature_dropout.default,
        ),
        K.IDENTITY,
    ),
}

NON_NEGATIVE: dict[Any, Callable[[fx.Node], bool]] = {
    aten.relu.default: lambda node: True,
    aten.relu6.default: lambda node: True,
    aten.sigmoid.default: lambda node: True,
    aten.hardsigmoid.default: lambda node: True,
    aten.softmax.int: lambda node: True,
    aten._softmax.default: lambda node: True,
    aten.softplus.default: lambda node: True,
    aten.hardtanh.default: lambda node: len(node.args) > 1 and _at_least_zero(node.args[1]),
    aten.clamp.default: lambda node: len(node.args) > 1 and _at_least_zero(node.args[1]),
    aten.clamp_min.default: lambda node: _at_least_zero(node.args[1]),
}
"""Operators whose result is never negative, with the condition on their arguments."""

BOUNDED_BY_ONE = frozenset({aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.hardsigmoid.default})
"""Operators whose results lie in [0, 1] whatever comes in."""


def _at_least_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0


def kind_of(node: fx.Node) -> OperatorKind:
    """The operator kind of a graph node; `OperatorKind.FLOAT` for operators without a row."""
    if node.op == "placeholder":
        return K.INPUT
    if node.op == "get_attr":
        return K.CONSTANT
    if node.op == "output":
        return K.OUTPUT
    if node.op == "call_module":
        return _module_kind(module_of(node))
    return FUNCTIONS.get(node.target, K.FLOAT)


def _module_kind(module: nn.Module) -> OperatorKind:
    for kind in type(module).__mro__:
        if kind in MODULES:
            return MODULES[kind]
    # Stochastic depth of any library: graph capture keeps it as a module, which does nothing in eval mode.
    return K.IDENTITY if type(module).__name__.endswith(("DropPath", "StochasticDepth")) else K.FLOAT


def module_of(node: fx.Node) -> nn.Module:
    """The module that a `call_module` node runs."""
    owner = node.graph.owning_module
    assert owner is not None
    assert isinstance(node.target, str)
    return owner.get_submodule(node.target)


def is_float_tensor(node: fx.Node) -> bool:
    """Whether a node yields one tensor of real numbers (not integers, booleans, sizes or several tensors)."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def non_negative(node: fx.Node) -> bool:
    """Whether a node's values are never negative, by the operators that lead to it."""
    kind = kind_of(node)
    if node.target in NON_NEGATIVE:
        return NON_NEGATIVE[node.target](node)
    if kind in TRANSPARENT or kind is K.AVERAGE:
        return non_negative(node.all_input_nodes[0])
    if kind in (K.CONCAT, K.MULTIPLY) or node.target is aten.add.Tensor:
        operands = node.all_input_nodes
        numbers = [a for a in node.args if isinstance(a, int | float)]
        return all(non_negative(operand) for operand in operands) and all(number >= 0 for number in numbers)
    return False


def describe(node: fx.Node) -> str:
    """A node in a reader's words: the module's path, or the operator's name."""
    if node.op == "call_module":
        return str(node.target)
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    return operator_name(node)


def operator_name(node: fx.Node) -> str:
    """Short name of an operator: "Conv2d", "relu", "add"."""
    if node.op == "call_module":
        return type(module_of(node)).__name__
    if is_operator(node.target):
        return short_name(node.target)
    return getattr(node.target, "__name__", str(node.target))


BOUNDS: dict[Any, tuple[str, str]] = {
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
}
"""Operators that clip, with the names of the arguments that hold the bounds."""


def clipping(node: fx.Node) -> tuple[float, float] | None:
    """The bounds [low, high] that an operator clips its input to; None where it does something else.

    A bound may be infinite: ReLU clips to [0, inf].
    """
    if node.op != "call_function":
        return None
    if node.target in (aten.relu.default, aten.relu6.default):
        return 0.0, 6.0 if node.target is aten.relu6.default else float("inf")
    if node.target is aten.clamp_min.default:
        low = node.args[1]
        return (float(low), float("inf")) if isinstance(low, int | float) else None
    if node.target not in BOUNDS:
        return None
    given = [arguments(node)[name] for name in BOUNDS[node.target]]
    if any(isinstance(bound, fx.Node) for bound in given):
        return None
    low, high = given
    return float("-inf") if low is None else float(low), float("inf") if high is None else float(high)


def tensor_names(graph: fx.Graph) -> dict[str, fx.Node]:
    """Names by which tensors are known to users, each with its node.

    A layer's output has the layer's path; a function's result the path of the module that calls it and the operator's
    name, numbered where there are several; an input its own name. An operator that took another's place keeps the
    name, which is in its `meta["halfeven_name"]`.
    """
    names: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("output", "get_attr"):
            continue
        if "halfeven_name" in node.meta:
            name = str(node.meta["halfeven_name"])
        elif node.op == "call_function":
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = str(stack[-1][0]) if stack else ""
            name = f"{path}.{operator_name(node)}" if path else operator_name(node)
        else:
            name = str(node.target)
        unique, number = name, 1
        while unique in names:
            unique, number = f"{name}_{number}", number + 1
        names[unique] = node
    return names
