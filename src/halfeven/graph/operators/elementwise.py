"""List the operators that act on each element: activations and arithmetic."""

import math
from collections.abc import Callable
from typing import Any

import torch

from halfeven.graph.operators.row import Arguments, Operator, OperatorKind, any_axis

aten = torch.ops.aten
K = OperatorKind


def _bounds_named(low: str, high: str | None) -> Callable[[Arguments], tuple[Any, Any]]:
    """Return a rule that reads the bounds of a call from the arguments of these names."""
    return lambda arguments: (arguments[low], None if high is None else arguments[high])


ACTIVATIONS = (
    Operator(target=aten.relu.default, kind=K.ACTIVATION, bounds=lambda _: (0.0, None), homogeneous=True),
    Operator(target=aten.relu6.default, kind=K.ACTIVATION, bounds=lambda _: (0.0, 6.0)),
    Operator(target=aten.hardtanh.default, kind=K.ACTIVATION, bounds=_bounds_named("min_val", "max_val")),
    Operator(target=aten.clamp.default, kind=K.ACTIVATION, bounds=_bounds_named("min", "max")),
    Operator(target=aten.clamp_min.default, kind=K.ACTIVATION, bounds=_bounds_named("min", None)),
    Operator(target=aten.leaky_relu.default, kind=K.ACTIVATION, homogeneous=True, factor_axis=any_axis),
    Operator(target=aten.prelu.default, kind=K.ACTIVATION, homogeneous=True, factor_axis=any_axis),
    Operator(target=aten.elu.default, kind=K.ACTIVATION),
    Operator(target=aten.silu.default, kind=K.ACTIVATION),
    Operator(target=aten.gelu.default, kind=K.ACTIVATION),
    Operator(target=aten.mish.default, kind=K.ACTIVATION),
    Operator(target=aten.softplus.default, kind=K.ACTIVATION, results=(0.0, math.inf)),
    Operator(target=aten.sigmoid.default, kind=K.ACTIVATION, results=(0.0, 1.0)),
    Operator(target=aten.hardsigmoid.default, kind=K.ACTIVATION, results=(0.0, 1.0)),
    Operator(target=aten.hardswish.default, kind=K.ACTIVATION),
    Operator(target=aten.tanh.default, kind=K.ACTIVATION),
)

ARITHMETIC = (
    Operator(target=aten.add.Tensor, kind=K.ADD),
    Operator(target=aten.sub.Tensor, kind=K.ADD, subtracts=True),
    Operator(target=aten.mul.Tensor, kind=K.MULTIPLY),
)

# Operators without a row run in float as well; these have a row for `kernel_rounded`.
IN_FLOAT = (
    Operator(target=aten.exp.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.expm1.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.log.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.log1p.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.erf.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.pow.Tensor_Scalar, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.rsqrt.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.sin.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.cos.default, kind=K.FLOAT, kernel_rounded=True),
)
