"""TensorRT: what it executes in integers, and where it wants quantizers."""

from halfeven.graph.operators import OperatorKind
from halfeven.targets.target import Target, any_grid, never, nowhere

K = OperatorKind

# From TensorRT's documentation (explicit quantization); it was not run.
TENSORRT = Target(
    name="tensorrt",
    weight_bits=range(8, 9),
    activation_bits=range(8, 9),
    inputs={
        K.CONVOLUTION: any_grid,
        K.LINEAR: any_grid,
        K.TRANSPOSED_CONVOLUTION: any_grid,
        K.MATMUL: any_grid,
        K.AVERAGE: any_grid,
    },
    stays_in_float=nowhere,
    elementwise=frozenset({K.ADD}),
    outputs=frozenset(),
    residual_branch_in_float=True,  # a quantizer there would keep convolution, addition and ReLU from being one kernel
    rounds_average=never,
    fuses_any_activation=True,
    stored_weights={},
    # Signed and symmetric alone: a QuantizeLinear with another zero point than 0 is refused.
    grids=frozenset({(True, True)}),
    signed_only=True,  # on GPUs zero points must be 0, and unsigned bytes are refused (its issues 2774 and 4698)
    multiplies_gates=False,
    int32_bias=False,
)
