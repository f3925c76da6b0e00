"""OpenVINO's CPU plugin: what it executes in integers, and where it wants quantizers."""

import torch
from torch import fx

from halfeven.graph.layer_shapes import ConvolutionShape
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.view import Op, kind_of
from halfeven.targets.target import ALL_GRIDS, GridRequirement, Target, any_grid, no_zero_point

K = OperatorKind
aten = torch.ops.aten
ARITHMETIC = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
"""Operators that the plugin moves into the limits of a quantizer behind, where one operand is a constant."""


def _average_grid(node: fx.Node) -> GridRequirement:
    """Return the grid that an average asks for: OpenVINO pads a pool with code 0, which is not 0 with a zero point."""
    return GridRequirement.NO_ZERO_POINT if Op(node).pads_zeros else GridRequirement.ANY


def _rounds_average(average: fx.Node) -> bool:
    """Return True where an average of integers is rounded to an integer for a reader that computes with bytes.

    Such readers are a BatchNorm, and a sum or product with another tensor or with itself; and behind a pool with a
    window, all that its kernel does not take in together with the quantizer behind.

    A BatchNorm that alone reads a mean becomes a part of the quantizer behind, and nothing is rounded; but not one
    behind a pool of sequences, which is a pool of images and a reshape there.
    """
    if is_integer_pool(average) and not all(_is_taken_in(user) for user in average.users):
        return True
    normalized = len(average.users) == 1 and kind_of(next(iter(average.users))) is K.BATCH_NORM
    row = Op(average).row
    of_sequences = row.window == 1 and not row.adaptive
    return (of_sequences or not normalized) and _read_as_bytes(average)


def is_integer_pool(average: fx.Node) -> bool:
    """Return True for a pool with a window: a mean has no kernel for integers, nor has a pool with `ceil_mode`."""
    row = Op(average).row
    return bool(row.window) and not row.adaptive and not Op(average).argument("ceil_mode")


def _is_taken_in(reader: fx.Node, *, moved: bool = False) -> bool:
    """Return True for a reader of a pool that computes with its fractions.

    The pool's kernel takes in the quantizer behind, and with it a clip, or arithmetic that the quantizer's limits
    take in: with numbers, and products with a constant of each channel. All else that keeps integers integers reads
    bytes. What does not (SiLU, a constant of each position) reads floats.

    Args:
        reader: of the pool.
        moved: operators that keep the scale stand between, and the kernel ends at them.
    """
    if kind_of(reader) in (*TRANSPARENT, K.CONCAT):
        return all(_is_taken_in(user, moved=True) for user in reader.users)
    if kind_of(reader) is K.ACTIVATION:
        return not moved if Op(reader).bounds is not None else not Op(reader).row.homogeneous
    if reader.target not in ARITHMETIC:
        return kind_of(reader) is not K.BATCH_NORM and not _is_negative(reader)
    shapes = [Op(operand).shape for operand in reader.all_input_nodes if Op(operand).is_constant]
    constants = [shape for shape in shapes if max(shape, default=1) > 1]
    if not all(is_of_channels(shape, Op(reader).ndim) for shape in constants):
        return True
    in_limits = not moved and (not constants or kind_of(reader) is not K.ADD)
    return in_limits and not _is_negative(reader) and all(map(_is_quantizer_or_layer, reader.users))


def _is_negative(node: fx.Node) -> bool:
    """Return True for a product with a negative number, or a number minus a tensor, which no quantizer takes in."""
    if Op(node).name in ("neg", "rsub"):
        return True
    return kind_of(node) is K.MULTIPLY and any(isinstance(x, int | float) and x < 0 for x in node.args)


def is_of_channels(shape: tuple[int, ...], ndim: int) -> bool:
    """Return True if a constant differs along the second axis alone: along others the plugin keeps an operator."""
    whole = (1,) * (ndim - len(shape)) + shape
    return len(whole) > 1 and whole[1] > 1 and all(size == 1 for axis, size in enumerate(whole) if axis != 1)


def _is_quantizer_or_layer(node: fx.Node) -> bool:
    """Return True for a quantizer, and for a layer, which has one at its input."""
    is_quantizer = Op(node).is_module and kind_of(node) is K.FLOAT
    return is_quantizer or kind_of(node) in (*WEIGHTED, K.MATMUL)


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
