"""Fold BatchNorm into the layer before it (white paper, section 2.3.1). No formula divides by gamma, which may be
zero."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import displace
from halfeven.graph.view import Op, kind_of, module_calls, module_of


def folding(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the factor on the weight's output channels and the new bias, each [channels], that replace a BatchNorm.

    `norm(conv(x) + bias) = factor * conv(x) + new_bias` in eval mode, with factor = gamma / sqrt(var + eps) and
    new_bias = factor * (bias - mean) + beta.
    """
    # In float64, so that only the folded weight and bias are rounded to float32.
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    mean = norm.running_mean.double()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    # White paper, section 2.3.1: b~ = beta + gamma (b - mean) / sqrt(var + eps), with the layer's own bias b.
    shift = factor * ((0.0 if bias is None else bias.detach().double()) - mean)
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor, shift.float()


def statistics(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel after a BatchNorm, each [channels] in float32.

    BatchNorm normalizes its input first, so they are beta and |gamma|; gamma may be negative.
    """
    ones = torch.ones_like(norm.running_mean)
    # A BatchNorm with affine=False has neither gamma nor beta: mean 0, deviation 1.
    mean = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach()
    std = ones if norm.weight is None else norm.weight.detach().abs()
    return mean.float().clone(), std.float().clone()


def foldable(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Return the pairs (layer, BatchNorm) of calls of modules, the BatchNorm being the only reader.

    A layer that is called several times, as the backbone of a siamese network is, has a pair for each call: all of its
    calls are read by the same BatchNorm, so that folding does to all of them the same.
    """
    calls = layer_calls(graph)
    pairs = []
    for layers in calls.values():
        norms = [norm_behind(layer) for layer in layers]
        if len({None if norm is None else norm.target for norm in norms}) == 1:
            pairs += [(layer, norm) for layer, norm in zip(layers, norms, strict=True) if norm is not None]
    return pairs


def layer_calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the calls of each convolution and linear layer that is a module, by the layer's path."""
    calls: dict[str, list[fx.Node]] = {}
    for op in module_calls(graph):
        if op.kind in WEIGHTED:
            calls.setdefault(op.path, []).append(op.node)
    return calls


def norm_behind(layer: fx.Node) -> fx.Node | None:
    """Return the call of a BatchNorm that alone reads a result and works on the layer's channels; else None.

    Args:
        layer: the call of a layer, or of a BatchNorm behind it.
    """
    reader = Op(layer).only_reader
    if reader is None or not reader.is_module or reader.kind is not OperatorKind.BATCH_NORM:
        return None
    return reader.node if scales_by_channel(layer) else None


def scales_by_channel(layer: fx.Node) -> bool:
    """Return True if a factor of each channel, axis 1 of a layer's output, can be multiplied into its weight."""
    kind = kind_of(layer)
    if kind is OperatorKind.TRANSPOSED_CONVOLUTION:
        # The output channels of a grouped one are no axis of its weight, which is [in, out / groups, ...].
        return bool(module_of(layer).groups == 1)
    # Of tokens, [samples, tokens, features], axis 1 are the tokens.
    return kind is not OperatorKind.LINEAR or Op(layer).ndim == 2


def output_axis(layer: fx.Node) -> int:
    """Return the axis of a layer's weight that indexes the output channels."""
    return 1 if kind_of(layer) is OperatorKind.TRANSPOSED_CONVOLUTION else 0


def fold(region: CapturedModule) -> int:
    """Fold every foldable BatchNorm of a region into the float layer before it, in place.

    The layer keeps the statistics of its outputs (see `kept_statistics`): algorithms without data use them, and
    algorithms that scale or shift the outputs scale and shift the statistics too.

    Returns:
        The number of calls of BatchNorms that were folded.
    """
    count = 0
    while pairs := foldable(region.graph):  # behind a BatchNorm that was folded there may be another
        folded: set[nn.Module] = set()
        for layer, node in pairs:
            module: Any = module_of(layer)
            if module not in folded:  # of a layer that is called several times, the first call
                folded.add(module)
                _fold_into(module, module_of(node), output_axis(layer))
            remove_module(region, node)
            count += 1
    region.recompile()
    return count


def _fold_into(layer: Any, norm: nn.Module, axis: int) -> None:
    factor, bias = folding(norm, layer.bias)
    shape = [1] * layer.weight.ndim
    shape[axis] = -1
    with torch.no_grad():
        # In place: the parameter keeps its identity and its name, by which checkpoints and optimizers know it.
        layer.weight.copy_((layer.weight.double() * factor.reshape(shape)).float())
    # Registering by attribute also fills the entry of a layer that was made with bias=False.
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
    keep_statistics(layer, *statistics(norm))


def keep_statistics(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Keep the mean and standard deviation of a layer's outputs, each [channels], with the layer.

    They are buffers, so they move with the layer; the state dict leaves them out, since they hold for the present
    weights alone.
    """
    layer.register_buffer("output_mean", mean, persistent=False)
    layer.register_buffer("output_std", std, persistent=False)


def kept_statistics(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the mean and standard deviation of a layer's outputs that `fold` kept; None if it kept none."""
    kept: Any = layer
    return (kept.output_mean, kept.output_std) if hasattr(layer, "output_mean") else None


def forget_statistics(model: nn.Module) -> None:
    """Drop the statistics that `fold` kept, because they no longer hold for the weights."""
    for module in model.modules():
        if kept_statistics(module) is not None:
            del module.output_mean
            del module.output_std


def remove_module(region: CapturedModule, node: fx.Node) -> None:
    """Remove the call of a module, whose readers then read its input; remove the module too after its last call."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    region.graph.erase_node(node)
    path = Op(node).path
    if not any(other.path == path for other in module_calls(region.graph)):
        displace(region, path)
