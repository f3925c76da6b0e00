"""List the operators that combine several values: averages, maxima, pools, sums and resampling."""

import torch

from halfeven.graph.operators.row import (
    Arguments,
    Operator,
    OperatorKind,
    along_last_axes,
    on_other_axes,
    reduced_axis,
)

aten = torch.ops.aten
K = OperatorKind


def _counts_zeros(arguments: Arguments) -> bool:
    """Return True for an average pool that pads, and counts the zeros in the average."""
    padding = arguments["padding"]
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded and bool(arguments["count_include_pad"])


def _average_pool(target: object, axes: int) -> Operator:
    rule = along_last_axes(axes)
    return Operator(target=target, kind=K.AVERAGE, window=axes, factor_axis=rule, pads_zeros=_counts_zeros)


def _adaptive_average(target: object, axes: int) -> Operator:
    return Operator(target=target, kind=K.AVERAGE, window=axes, factor_axis=along_last_axes(axes), adaptive=True)


def _max_pool(target: object, axes: int) -> Operator:
    rule = along_last_axes(axes)
    return Operator(target=target, kind=K.SAME_SCALE, window=axes, factor_axis=rule, takes_maximum=True)


def _resampling(target: object, kind: OperatorKind) -> Operator:
    return Operator(target=target, kind=kind, window=2, factor_axis=along_last_axes(2))


OVER_WINDOWS = (
    _average_pool(aten.avg_pool1d.default, 1),
    _average_pool(aten.avg_pool2d.default, 2),
    _average_pool(aten.avg_pool3d.default, 3),
    _adaptive_average(aten.adaptive_avg_pool1d.default, 1),
    _adaptive_average(aten.adaptive_avg_pool2d.default, 2),
    _adaptive_average(aten.adaptive_avg_pool3d.default, 3),
    _max_pool(aten.max_pool1d.default, 1),
    _max_pool(aten.max_pool2d.default, 2),
    _max_pool(aten.max_pool3d.default, 3),
    # It also returns the positions of the maxima, so no quantizer can be moved behind it.
    Operator(
        target=aten.adaptive_max_pool2d.default,
        kind=K.SAME_SCALE,
        window=2,
        adaptive=True,
        factor_axis=along_last_axes(2),
    ),
    # Nearest neighbours are copies, on the input's grid; bilinear and bicubic sampling compute new numbers.
    _resampling(aten.upsample_nearest2d.vec, K.SAME_SCALE),
    _resampling(aten.upsample_nearest2d.default, K.SAME_SCALE),
    _resampling(aten.upsample_bilinear2d.vec, K.INTERPOLATION),
    Operator(target=aten.upsample_bicubic2d.vec, kind=K.INTERPOLATION, window=2),
)

OVER_AXES = (
    Operator(
        target=aten.mean.dim,
        kind=K.AVERAGE,
        factor_axis=reduced_axis,
        passes_features=on_other_axes("dim"),
    ),
    Operator(target=aten.mean.default, kind=K.AVERAGE),
    # The largest value is an element of the tensor, on its grid; a mean is not (white paper, section 2.3).
    Operator(target=aten.amax.default, kind=K.SAME_SCALE, factor_axis=reduced_axis),
    Operator(target=aten.sum.dim_IntList, kind=K.FLOAT, kernel_rounded=True),
    *(
        Operator(target=overload, kind=K.FLOAT, kernel_rounded=True)
        for deviations in (aten.var, aten.std, aten.var_mean, aten.std_mean)
        for overload in (deviations.correction, deviations.dim)
    ),
    Operator(target=aten.linalg_vector_norm.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.logsumexp.default, kind=K.FLOAT, kernel_rounded=True),
)
