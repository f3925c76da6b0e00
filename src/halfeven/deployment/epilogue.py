"""The BatchNorms, multiplications and additions behind a layer that its weight and bias take in when it is deployed.

Runtimes would fold them too, and lose the layer's integers or its name. A normalization written out by hand is a
subtraction and a division. A layer that is called several times is copied where its calls end in different ones:
EfficientDet's heads share a convolution between levels and have a BatchNorm for each, FCOS' heads a learned factor.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.graph.batchnorm import folding, layer_calls, norm_behind, scales_by_channel
from halfeven.graph.layer_shapes import channel_axis
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.quantization.model_quantizers import has_quantized_weight

aten = torch.ops.aten

MULTIPLICATIONS = (aten.mul.Tensor, aten.div.Tensor)
ADDITIONS = (aten.add.Tensor, aten.sub.Tensor)


def epilogue(layer: fx.Node) -> list[fx.Node]:
    """Return the BatchNorms, and the arithmetic with constants, behind the call of a layer.

    They are in their order; each is the only reader of the operator before it, and has a number for each of the layer's
    channels. The last of them multiplies: an addition that ends the chain stays an operator.
    """
    found: list[fx.Node] = []
    last = layer
    while scales_by_channel(layer) or kind_of(layer) is OperatorKind.LINEAR:
        # Axis 1 of tokens is not that of a linear layer's channels: a BatchNorm there is no part of the epilogue, while
        # arithmetic on the last axis may be.
        behind = norm_behind(last) if scales_by_channel(layer) else None
        behind = behind or _arithmetic_behind(last, layer)
        if behind is None:
            break
        found.append(behind)
        last = behind
    while found and Op(found[-1]).function in ADDITIONS:
        found.pop()
    return found


def split_by_epilogue(region: CapturedModule) -> None:
    """Copy each layer whose calls end in different epilogues, in place, so that each copy can take in its epilogue."""
    for path, calls in layer_calls(region.graph).items():
        if not has_quantized_weight(module_of(calls[0])):
            continue
        groups: dict[tuple[object, ...], list[fx.Node]] = {}
        for call in calls:
            groups.setdefault(tuple(_epilogue_identity(node) for node in epilogue(call)), []).append(call)
        # Calls without an epilogue keep the layer: a copy is named after the operator that makes it another.
        for group in sorted(groups.values(), key=lambda group: bool(epilogue(group[0])))[1:]:
            behind = epilogue(group[0])[0]
            name = Op(behind).path if Op(behind).is_module else behind.name
            copied = f"{path}_before_{name.replace('.', '_')}"
            place(region, copied, copy.deepcopy(region.get_submodule(path)))
            for call in group:
                call.target = copied


def folded_epilogue(nodes: list[fx.Node], layer: fx.Node, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the factor on a layer's output channels and its new bias, [channels] each, that replace an epilogue.

    Args:
        nodes: of `epilogue`, at least one.
        layer: the call of the layer.
        bias: the layer's bias.
    """
    # In float64: the factors of several operators are rounded to float32 once, with the scale.
    total = torch.ones((), dtype=torch.float64)
    for node in nodes:
        if Op(node).is_module:
            factor, bias = folding(module_of(node), bias)
            total = total * factor.double()
        elif Op(node).function in ADDITIONS:
            term = _channel_constant(node, layer)
            bias = term if bias is None else bias + term
        else:
            factor = _channel_constant(node, layer)
            bias = None if bias is None else bias * factor
            total = total * factor.double()
    return total, bias


def _arithmetic_behind(node: fx.Node, layer: fx.Node) -> fx.Node | None:
    """Return the only reader of a node if it multiplies by constants of each channel, or adds them; else None."""
    reader = Op(node).only_reader
    # Keyword arguments are `alpha` of an addition, a factor on its second operand.
    if reader is None or reader.function not in (*MULTIPLICATIONS, *ADDITIONS) or reader.node.kwargs:
        return None
    values = _constant_of(reader.node, node)
    if values is None:
        return None
    ndim = Op(layer).ndim
    # As torch broadcasts: missing axes stand first. Only the axis of the channels may have another size than 1.
    wide = (1,) * (ndim - values.ndim) + tuple(values.shape)
    axis = channel_axis(layer, layer)
    fits = len(wide) == ndim and all(size == 1 for place, size in enumerate(wide) if place != axis)
    return reader.node if fits else None


def _constant_of(arithmetic: fx.Node, of: fx.Node) -> Tensor | None:
    """Return the numbers that a tensor is multiplied by, or that are added to it.

    None where they are computed, or where the tensor is the divisor or is subtracted.
    """
    (first, second) = arithmetic.args
    inverts = arithmetic.target in (aten.div.Tensor, aten.sub.Tensor)
    if first is second or (inverts and first is not of):
        return None
    other = second if first is of else first
    if isinstance(other, int | float):
        values = torch.tensor(float(other))
    elif isinstance(other, fx.Node) and Op(other).is_constant:
        values = Op(other).constant.detach().float()
    else:
        return None
    if not inverts:
        return values
    return 1 / values if arithmetic.target is aten.div.Tensor else -values


def _channel_constant(arithmetic: fx.Node, layer: fx.Node) -> Tensor:
    (source,) = [operand for operand in arithmetic.all_input_nodes if not Op(operand).is_constant]
    values = _constant_of(arithmetic, source)
    assert values is not None
    return values.flatten().expand(Op(layer).shape[channel_axis(layer, layer)])


def _epilogue_identity(node: fx.Node) -> object:
    """Return the same value for epilogues that multiply by the same factors."""
    return (
        node.target if Op(node).is_module else (node.target, *(_argument_identity(argument) for argument in node.args))
    )


def _argument_identity(argument: Any) -> object:
    if not isinstance(argument, fx.Node):
        return argument
    return argument.target if Op(argument).is_constant else None
