"""ONNX Runtime's CPU execution provider: what it executes in integers, and where it wants quantizers."""

from torch import fx

from halfeven.graph.layer_shapes import ConvolutionShape
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import kind_of
from halfeven.targets.target import ALL_GRIDS, Target, any_grid, never

K = OperatorKind

LEAST_INPUTS_IN_3D = 32
"""Input channels from which the integer kernel of a convolution of volumes is the faster one (version 1.32).

Int8 over float, of 3x3x3 kernels on 8 x 16 x 16, with AVX2: 4.6 for 3 channels, 2.2 for 8, 0.8 for 16, 0.5 for 32, 0.3
for 64; with AVX-512 and VNNI 1.9 to 3.3 for 3 and 16, 0.4 for 32. A depthwise one is faster in integers: 0.7."""


def _stays_in_float(node: fx.Node) -> str | None:
    if kind_of(node) is not K.CONVOLUTION:
        return None
    shape = ConvolutionShape.of(node)
    depthwise = shape.inputs_per_group == 1 < shape.groups
    if len(shape.kernel) < 3 or depthwise or shape.inputs_per_group >= LEAST_INPUTS_IN_3D:
        return None
    return f"is slower in integers on volumes of fewer than {LEAST_INPUTS_IN_3D} channels"


ONNXRUNTIME = Target(
    name="onnxruntime",
    weight_bits=range(2, 9),
    activation_bits=range(2, 9),
    inputs={
        K.CONVOLUTION: any_grid,
        K.LINEAR: any_grid,
        K.MATMUL: any_grid,
        K.AVERAGE: any_grid,
    },  # it has no integer kernel for transposed convolutions
    stays_in_float=_stays_in_float,
    # QLinearAdd and QLinearMul
    elementwise=frozenset({K.ADD, K.MULTIPLY}),
    # QLinearConv writes integers only: without a quantizer behind it, the convolution runs in float.
    outputs=frozenset({K.CONVOLUTION, K.ADD, K.MULTIPLY, K.AVERAGE}),  # linear layers and products may end in float
    residual_branch_in_float=False,  # QLinearAdd wants integers on both sides, and so does the convolution before it
    rounds_average=never,
    fuses_any_activation=False,  # QLinearConv takes in a ReLU or a clip; a SiLU or GELU behind it runs in float
    stored_weights={K.LINEAR: (4, 8)},  # MatMulNBits
    grids=ALL_GRIDS,
    signed_only=False,
    # The float kernels of SiLU and hard-swish make floats of the bytes, and bytes of the result.
    multiplies_gates=True,
    int32_bias=True,  # QLinearConv and QGemm add them to the accumulator
)
