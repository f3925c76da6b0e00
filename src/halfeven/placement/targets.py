"""The rules of the runtimes, as data: one row per target."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from halfeven.errors import PlacementError
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


def _any(node: fx.Node) -> Grid:
    return Grid.ANY


def _no_zero_point(node: fx.Node) -> Grid:
    return Grid.NO_ZERO_POINT


def _average(node: fx.Node) -> Grid:
    """OpenVINO pads an average pool with level 0, which is not zero where there is a zero point."""
    pads = node.target in _PADDED_POOLS and len(node.args) > 3 and any(_numbers(node.args[3]))
    counted = len(node.args) <= 5 or bool(node.args[5])
    return Grid.NO_ZERO_POINT if pads and counted else Grid.ANY


def _numbers(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


_PADDED_POOLS = (
    torch.ops.aten.avg_pool1d.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.avg_pool3d.default,
)

OPENVINO = Target(
    name="openvino",
    weight_bits=range(2, 9),
    activation_bits=range(2, 9),  # 16-bit FakeQuantize operators are removed by the plugin, clipping included
    inputs={
        K.CONVOLUTION: _any,
        K.LINEAR: _any,
        K.TRANSPOSED_CONVOLUTION: _no_zero_point,  # with one, the deconvolution runs in float
        K.MATMUL: _no_zero_point,  # with one, the whole attention runs in float
        K.AVERAGE: _average,
    },
    rounds_averages=True,
    residual_branch_in_float=True,  # the plugin drops the rounding of a quantizer between a convolution and a fused sum
    stored_weights={K.LINEAR: (4, 8)},
)

ONNXRUNTIME = Target(
    name="onnxruntime",
    weight_bits=range(2, 9),
    activation_bits=range(2, 9),
    inputs={
        K.CONVOLUTION: _any,
        K.LINEAR: _any,
        K.MATMUL: _any,
        K.AVERAGE: _any,
    },  # it has no integer kernel for transposed convolutions
    residual_branch_in_float=False,  # QLinearAdd wants integers on both sides, and so does the convolution before it
    elementwise=frozenset({K.ADD, K.MULTIPLY}),
    outputs=frozenset({K.CONVOLUTION, K.ADD, K.MULTIPLY, K.AVERAGE}),  # linear layers and products may end in float
    stored_weights={K.LINEAR: (4, 8)},
    fuses_any_activation=False,
    unsigned_only=True,  # on x86
    integer_bias=True,
)

TENSORRT = Target(
    name="tensorrt",
    weight_bits=range(8, 9),
    activation_bits=range(8, 9),
    inputs={
        K.CONVOLUTION: _any,
        K.LINEAR: _any,
        K.TRANSPOSED_CONVOLUTION: _any,
        K.MATMUL: _any,
        K.AVERAGE: _any,
    },
    residual_branch_in_float=True,  # a quantizer there would keep convolution, addition and ReLU from being one kernel
    signed_only=True,
)

TARGETS: dict[str, Target] = {target.name: target for target in (OPENVINO, ONNXRUNTIME, TENSORRT)}


def target_named(name: str) -> Target:
    """A target by its name; raises PlacementError for one that does not exist."""
    if name not in TARGETS:
        raise PlacementError(f'There is no target "{name}". Choose one of {", ".join(TARGETS)}.')
    return TARGETS[name]


def wanted_grid(target: Target, node: fx.Node) -> Grid | None:
    """The grid that the operator takes its inputs on; None where it computes in float."""
    rule = target.inputs.get(kind_of(node))
    return None if rule is None else rule(node)
