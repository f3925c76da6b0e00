"""Fold BatchNorm into the layer before it (white paper, section 2.3.1). No formula divides by gamma, which may be
zero."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule, place
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
    """Return the pairs (layer, BatchNorm) of modules that are called once, the BatchNorm being the only reader."""
    calls: dict[Any, int] = {}
    for node in graph.nodes:
        calls[node.target] = calls.get(node.target, 0) + Op(node).is_module
    pairs = []
    for node in graph.nodes:
        if not Op(node).is_module or kind_of(node) is not OperatorKind.BATCH_NORM:
            continue
        layer = node.all_input_nodes[0]
        if not Op(layer).is_module or kind_of(layer) not in WEIGHTED or len(layer.users) != 1:
            continue
        # The output channels of a grouped transposed convolution are no axis of its weight, which is
        # [in, out / groups, ...]: a factor of each channel cannot be multiplied in.
        grouped_transposed = kind_of(layer) is OperatorKind.TRANSPOSED_CONVOLUTION and module_of(layer).groups != 1
        if calls[layer.target] == calls[node.target] == 1 and not grouped_transposed:
            pairs.append((layer, node))
    return pairs


def split_shared(region: CapturedModule) -> None:
    """Copy a layer that is called several times for each call that a separate BatchNorm follows, so that all fold.

    EfficientDet's heads share a convolution between levels, and each level has its own BatchNorm. Training needs the
    shared weight; call this before folding for deployment, where the weights of the copies differ.
    """
    calls: dict[Any, list[fx.Node]] = defaultdict(list)
    for op in module_calls(region.graph):
        calls[op.path].append(op.node)
    for path, layers in list(calls.items()):
        if len(layers) < 2 or kind_of(layers[0]) not in WEIGHTED:
            continue
        readers = [list(layer.users) for layer in layers]
        norms = [users[0] for users in readers if len(users) == 1 and kind_of(users[0]) is OperatorKind.BATCH_NORM]
        if len(norms) < len(layers) or any(len(calls[norm.target]) != 1 for norm in norms):
            continue
        # The first call keeps the shared layer under its own name.
        for layer, norm in list(zip(layers, norms, strict=True))[1:]:
            layer.target = f"{path}_before_{str(norm.target).replace('.', '_')}"
            place(region, layer.target, copy.deepcopy(region.get_submodule(path)))


def output_axis(layer: fx.Node) -> int:
    """Return the axis of a layer's weight that indexes the output channels."""
    return 1 if kind_of(layer) is OperatorKind.TRANSPOSED_CONVOLUTION else 0


def fold(region: CapturedModule) -> int:
    """Fold every foldable BatchNorm of a region into the float layer before it, in place.

    The layer keeps the statistics of its outputs (see `kept_statistics`): algorithms without data use them, and
    algorithms that scale or shift the outputs scale and shift the statistics too.

    Returns:
        The number of folded BatchNorms.
    """
    pairs = foldable(region.graph)
    for layer, node in pairs:
        module: Any = module_of(layer)
        factor, bias = folding(module_of(node), module.bias)
        shape = [1] * module.weight.ndim
        shape[output_axis(layer)] = -1
        with torch.no_grad():
            # In place: the parameter keeps its identity and its name, by which checkpoints and optimizers know it.
            module.weight.copy_((module.weight.double() * factor.reshape(shape)).float())
        # Registering by attribute also fills the entry of a layer that was made with bias=False.
        module.bias = nn.Parameter(bias.to(module.weight))
        keep_statistics(module, *statistics(module_of(node)))
        remove(region, node)
    region.recompile()
    return len(pairs)


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


def remove(region: CapturedModule, node: fx.Node) -> None:
    """Remove the call of a module, whose readers then read its input; remove the module too after its last call."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    region.graph.erase_node(node)
    path = Op(node).path
    if not any(other.path == path for other in module_calls(region.graph)):
        region.delete_submodule(path)
