"""Layer normalizations as OpenVINO's CPU plugin reads their input."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.view import module_of
from halfeven.runtimes.openvino.exact_values import Codes, ScaledSum
from halfeven.runtimes.simulation import real_values


def is_layer_norm(node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module_of(node), nn.LayerNorm)
    return node.target is torch.ops.aten.layer_norm.default


def layer_norm_input(x: Any) -> Tensor:
    """Return the input of a layer normalization: of a tensor without a zero point, its integers.

    The plugin moves the scale behind the normalization, which cancels it, and leaves the epsilon unchanged.
    """
    if isinstance(x, ScaledSum):
        return x.values
    if isinstance(x, Codes) and not bool(x.limits.zero_byte):
        return x.bytes
    real: Tensor = real_values(x)
    return real
