"""ONNX Runtime's CPU execution provider: what it executes in integers, and where it wants quantizers."""

from halfeven.graph.operators import OperatorKind
from halfeven.targets.target import Target, any_grid, never

K = OperatorKind

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
    elementwise=frozenset({K.ADD, K.MULTIPLY}),
    outputs=frozenset({K.CONVOLUTION, K.ADD, K.MULTIPLY, K.AVERAGE}),  # linear layers and products may end in float
    residual_branch_in_float=False,  # QLinearAdd wants integers on both sides, and so does the convolution before it
    rounds_average=never,
    fuses_any_activation=False,
    stored_weights={K.LINEAR: (4, 8)},
    signed_only=False,
    int32_bias=True,
)
