"""List the operators that move, copy, join, pad or cut out values."""

import operator

import torch

from halfeven.graph.operators.row import (
    Operator,
    OperatorKind,
    flattened_axis,
    keeps_features,
    keeps_last_place,
    keeps_last_size,
    on_other_axes,
    pads_nothing,
    zero_padded_axis,
)

aten = torch.ops.aten
K = OperatorKind


# A reshape passes factors of channels only as a flattening: other shapes mix channels and positions.
def _reshape(target: object) -> Operator:
    return Operator(target=target, kind=K.SAME_SCALE, factor_axis=flattened_axis, passes_features=keeps_last_size)


MOVES = (
    _reshape(aten.view.default),
    _reshape(aten.reshape.default),
    _reshape(aten.flatten.using_ints),
    Operator(target=aten.unflatten.int, kind=K.SAME_SCALE),
    Operator(target=aten.permute.default, kind=K.SAME_SCALE, passes_features=keeps_last_place),
    Operator(target=aten.transpose.int, kind=K.SAME_SCALE, passes_features=on_other_axes("dim0", "dim1")),
    Operator(target=aten.t.default, kind=K.SAME_SCALE),
    Operator(target=aten.squeeze.dim, kind=K.SAME_SCALE),
    Operator(target=aten.squeeze.dims, kind=K.SAME_SCALE),
    Operator(target=aten.squeeze.default, kind=K.SAME_SCALE),
    Operator(target=aten.unsqueeze.default, kind=K.SAME_SCALE),
    Operator(target=aten.expand.default, kind=K.SAME_SCALE),
    Operator(target=aten.roll.default, kind=K.SAME_SCALE, passes_features=on_other_axes("dims")),
    Operator(target=aten.flip.default, kind=K.SAME_SCALE),
    Operator(target=aten.repeat.default, kind=K.SAME_SCALE),
    Operator(target=aten.pixel_shuffle.default, kind=K.SAME_SCALE),
    Operator(target=aten.pixel_unshuffle.default, kind=K.SAME_SCALE),
    Operator(target=aten.channel_shuffle.default, kind=K.SAME_SCALE),
)

PARTS = (
    Operator(target=operator.getitem, kind=K.SAME_SCALE),
    Operator(
        target=aten.slice.Tensor,
        kind=K.SAME_SCALE,
        passes_features=on_other_axes("dim"),
        scatter=aten.slice_scatter.default,
    ),
    Operator(
        target=aten.select.int,
        kind=K.SAME_SCALE,
        passes_features=on_other_axes("dim"),
        scatter=aten.select_scatter.default,
    ),
    Operator(target=aten.split.Tensor, kind=K.SAME_SCALE, splits=True),
    Operator(target=aten.split_with_sizes.default, kind=K.SAME_SCALE, splits=True),
    Operator(target=aten.split.sizes, kind=K.SAME_SCALE, splits=True),
    Operator(target=aten.chunk.default, kind=K.SAME_SCALE, splits=True),
    Operator(target=aten.unbind.int, kind=K.SAME_SCALE),
    Operator(target=aten.narrow.default, kind=K.SAME_SCALE),
    Operator(target=aten.index_select.default, kind=K.SAME_SCALE),
)

COPIES = (
    Operator(target=aten.contiguous.default, kind=K.IDENTITY, passes_features=keeps_features),
    Operator(target=aten.clone.default, kind=K.IDENTITY, passes_features=keeps_features),
    Operator(target=aten.alias.default, kind=K.IDENTITY, passes_features=keeps_features),
    Operator(target=aten.detach.default, kind=K.IDENTITY),
)

JOINS = (
    Operator(target=aten.cat.default, kind=K.CONCAT),
    Operator(
        target=aten.constant_pad_nd.default,
        kind=K.PAD,
        factor_axis=zero_padded_axis,
        passes_features=pads_nothing,
        pads_zeros=lambda arguments: True,
    ),
    Operator(
        target=aten.pad.default,
        kind=K.PAD,
        factor_axis=zero_padded_axis,
        passes_features=pads_nothing,
        pads_zeros=lambda arguments: arguments["mode"] == "constant",
    ),
)
