"""OpenVINO's CPU plugin: what it executes in integers, and where it wants quantizers."""

from torch import fx

from halfeven.graph.layer_shapes import ConvolutionShape
from halfeven.graph.operators import TRANSPARENT, OperatorKind
from halfeven.graph.view import Op, kind_of
from halfeven.targets.target import ALL_GRIDS, GridRequirement, Target, any_grid, no_zero_point

K = OperatorKind


def _average_grid(node: fx.Node) -> GridRequirement:
    """Return the grid that an average asks for: OpenVINO pads a pool with code 0, which is not 0 with a zero point."""
    return GridRequirement.NO_ZERO_POINT if Op(node).pads_zeros else GridRequirement.ANY


def _rounds_average(average: fx.Node) -> bool:
    """Return True where an average of integers is rounded to an integer for a reader that computes with bytes.

    Such readers are a BatchNorm, a leaky ReLU, a negative factor, and a sum or product with another tensor or with
    itself.

    A BatchNorm that alone reads the average becomes a part of the quantizer behind, and nothing is rounded; but not one
    behind a pool of sequences, which is a pool of images and a reshape there.
    """
    normalized = len(average.users) == 1 and kind_of(next(iter(average.users))) is K.BATCH_NORM
    row = Op(average).row
    of_sequences = row.window == 1 and not row.adaptive
    if normalized and not of_sequences:
        return False
    own_operators = any(_is_leaky(user) or _is_negative(user) for user in average.users)
    return _read_as_bytes(average) or (is_integer_pool(average) and own_operators)


def is_integer_pool(average: fx.Node) -> bool:
    """Return True for a pool with a window: a mean has no kernel for integers, nor has a pool with `ceil_mode`."""
    row = Op(average).row
    return bool(row.window) and not row.adaptive and not Op(average).argument("ceil_mode")


def _is_leaky(node: fx.Node) -> bool:
    return kind_of(node) is K.ACTIVATION and Op(node).row.homogeneous and Op(node).bounds is None


def _is_negative(node: fx.Node) -> bool:
    """Return True for a product with a negative number, which no quantizer takes in."""
    if Op(node).name == "neg":
        return True
    return kind_of(node) is K.MULTIPLY and any(isinstance(x, int | float) and x < 0 for x in node.args)


def _read_as_bytes(node: fx.Node) -> bool:
    """Return True if a reader of a tensor, directly or behind operators that keep the scale, computes with bytes."""
    return any(
        kind_of(user) is K.BATCH_NORM
        or (kind_of(user) in (K.ADD, K.MULTIPLY) and _is_of_tensors(user))
        or (kind_of(user) in (*TRANSPARENT, K.CONCAT) and _read_as_bytes(user))
        for user in node.users
    )


def _is_of_tensors(combination: fx.Node) -> bool:
    """Return True if both operands are computed: neither is a number or a parameter."""
    operands = [operand for operand in combination.args[:2] if isinstance(operand, fx.Node)]
    return len([operand for operand in operands if kind_of(operand) is not K.CONSTANT]) == 2


LARGEST_STRIDE = 3
"""Stride along the last axis up to which a transposed convolution has an integer kernel (version 2026.4)."""


def _stays_in_float(node: fx.Node) -> str | None:
    """Return a reason for transposed convolutions of shapes whose kernel reads integers and computes in float.

    Kernel 2, stride 2; 3, 2 (output padding 1); 4, 2 run in integers. Groups, also depthwise, and 8, 4; 16, 8 do not.
    """
    if kind_of(node) is not K.TRANSPOSED_CONVOLUTION:
        return None
    shape = ConvolutionShape.of(node)
    if shape.groups > 1:
        return "has no integer kernel for a transposed convolution in groups"
    if shape.stride[-1] > LARGEST_STRIDE:
        return f"has no integer kernel for a transposed convolution of stride {shape.stride[-1]}"
    if any(size < stride for size, stride in zip(shape.kernel, shape.stride, strict=True)):
        return "has no integer kernel for a transposed convolution whose stride is larger than its kernel"
    return None


OPENVINO = Target(
    name="openvino",
    # Kernels multiply bytes: integers of fewer bits lie in bytes, and save no time.
    weight_bits=range(2, 9),
    activation_bits=range(2, 9),  # 16-bit FakeQuantize operators are removed by the plugin, clipping included
    inputs={
        K.CONVOLUTION: any_grid,
        K.LINEAR: any_grid,
        K.TRANSPOSED_CONVOLUTION: no_zero_point,  # with one, the deconvolution runs in float
        K.MATMUL: no_zero_point,  # with one, the whole attention runs in float
        K.AVERAGE: _average_grid,
    },
    stays_in_float=_stays_in_float,
    elementwise=frozenset({K.ADD}),
    # Layers write floats as well as integers, so no layer needs a quantizer at its result.
    outputs=frozenset(),
    residual_branch_in_float=True,  # the plugin drops the rounding of a quantizer between a convolution and a fused sum
    rounds_average=_rounds_average,
    fuses_any_activation=True,  # in the layer's kernel, in float32
    stored_weights={K.LINEAR: (4, 8)},
    grids=ALL_GRIDS,
    signed_only=False,
    multiplies_gates=False,
    int32_bias=False,  # biases are added in float32
)
