"""OpenVINO's CPU plugin: what it executes in integers, and where it wants quantizers."""

import torch
from torch import fx

from halfeven.graph.operators import OperatorKind
from halfeven.targets.target import Grid, Target, any_grid, no_zero_point

K = OperatorKind


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
        K.CONVOLUTION: any_grid,
        K.LINEAR: any_grid,
        K.TRANSPOSED_CONVOLUTION: no_zero_point,  # with one, the deconvolution runs in float
        K.MATMUL: no_zero_point,  # with one, the whole attention runs in float
        K.AVERAGE: _average,
    },
    rounds_averages=True,
    residual_branch_in_float=True,  # the plugin drops the rounding of a quantizer between a convolution and a fused sum
    stored_weights={K.LINEAR: (4, 8)},
)
