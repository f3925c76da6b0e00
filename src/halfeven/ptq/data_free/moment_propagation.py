"""Distributions of all tensors of a graph, from what BatchNorm knows of the training data.

A channel after BatchNorm has mean beta and standard deviation |gamma| (white paper, section 3.1, arXiv:2106.08295);
what is known of all other tensors follows through the operators between.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.batchnorm import kept_statistics, statistics
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.ptq.data_free.moments import (
    Distribution,
    added,
    clipped,
    collapsed,
    constant,
    gaussian,
    joined,
    multiplied,
    scaled,
    through,
)
from halfeven.ptq.equalization.layer_pairs import apply_to_constant, channel_axis, weight_by_channel
from halfeven.quantization.quantizer import Quantizer

K = OperatorKind


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is taken for known of a model's inputs. The defaults fit inputs that were normalized over a data set."""

    mean: float = 0.0
    std: float = 1.0
    low: float = -3.0
    """Smallest value: an image that was normalized over natural images does not reach 3 deviations."""
    high: float = 3.0

    def distribution(self) -> Distribution:
        """These numbers, for all channels alike."""
        numbers = torch.tensor([[self.mean], [self.std], [self.low], [self.high]], dtype=torch.float64)
        mean, std, low, high = numbers.unbind()
        return Distribution(mean, std, low, high, measured=False)


NORMALIZED = Inputs()
"""Inputs that were normalized to mean 0 and standard deviation 1."""


def propagated(
    region: CapturedModule, *, alpha: float = 6.0, inputs: Inputs | None = NORMALIZED
) -> dict[fx.Node, Distribution]:
    """What is known of each tensor of a graph without data; a tensor that nothing is known of is not in it.

    Args:
        region: a graph, with or without quantizers.
        alpha: standard deviations to each side that an extent reaches (white paper, section 3.1).
        inputs: what is known of the graph's inputs; None: nothing.
    """
    found: dict[fx.Node, Distribution] = {}
    walk = _Walk(region, found, alpha, inputs)
    for node in region.graph.nodes:
        if Op(node).is_float_tensor and (known := walk.of(node)) is not None:
            found[node] = known
    return found


@dataclass(frozen=True)
class _Walk:
    """The way through a graph, each node after those it reads."""

    region: CapturedModule
    found: dict[fx.Node, Distribution]
    alpha: float
    inputs: Inputs | None

    def of(self, node: fx.Node) -> Distribution | None:
        """A node's distribution, or None where nothing is known of it."""
        kind = kind_of(node)
        if kind is K.INPUT:
            return None if self.inputs is None else self.inputs.distribution()
        if kind in (K.ADD, K.MULTIPLY):
            return self._of_two(node)
        if kind is K.CONCAT:
            return self._joined(node)
        x = self.found.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if node.op == "call_module":
            return self._of_module(node, module_of(node), x)
        return None if x is None else self._of_function(node, kind, x)

    def _of_module(self, node: fx.Node, module: Any, x: Distribution | None) -> Distribution | None:
        """What a module puts out. A normalization says it by itself, whatever comes in."""
        kind = kind_of(node)
        if kind is K.IDENTITY or isinstance(module, Quantizer):
            return x
        if (kept := kept_statistics(module)) is not None:
            mean, std = kept
            return gaussian(mean, std, self.alpha, channel_axis(node, node), True)
        if kind is K.BATCH_NORM:
            mean, std = statistics(module)
            return gaussian(mean, std, self.alpha, 1, True)
        if kind is K.NORMALIZATION and module.weight is not None:
            mean = torch.zeros_like(module.weight) if module.bias is None else module.bias
            axis = 1 if isinstance(module, nn.GroupNorm) else _ndim(node) - 1
            one_axis = module.weight.ndim == 1
            return gaussian(mean, module.weight.abs(), self.alpha, axis, True) if one_axis else None
        if kind not in WEIGHTED or x is None:
            return None
        mean, std = layer_moments(module, *input_moments(node, x))
        return gaussian(mean, std, self.alpha, channel_axis(node, node), False)

    def _of_function(self, node: fx.Node, kind: OperatorKind, x: Distribution) -> Distribution | None:
        if (bounds := Op(node).bounds) is not None:
            return clipped(x, *bounds)
        if kind is K.ACTIVATION:
            function: Any = node.target
            rest = [_for_channels(self._value(argument), len(x.mean)) for argument in node.args[1:]]
            return through(x, lambda values: function(values.float(), *rest, **node.kwargs).double())
        if kind in (K.SAME_SCALE, K.IDENTITY, K.AVERAGE, K.PAD, K.INTERPOLATION):
            return _moved(node, x)
        return None

    def _of_two(self, node: fx.Node) -> Distribution | None:
        """A sum, difference or product; an operand is a tensor, a number, or a constant of the model."""
        operands = [self._operand(node, operand) for operand in node.args[:2]]
        if any(operand is None for operand in operands) or len(operands) < 2:
            return None
        a, b = operands
        assert a is not None
        assert b is not None
        if kind_of(node) is K.MULTIPLY:
            return multiplied(a, b)
        sign = -1.0 if Op(node).row.subtracts else 1.0
        return added(a, scaled(b, sign * float(Op(node).arguments.get("alpha", 1))), self.alpha)

    def _operand(self, node: fx.Node, operand: Any) -> Distribution | None:
        if not isinstance(operand, fx.Node):
            return constant(operand) if isinstance(operand, int | float) else None
        if kind_of(operand) is K.CONSTANT:
            return constant(self._value(operand))
        x = self.found.get(operand)
        return collapsed(x) if x is not None and _ndim(operand) != _ndim(node) else x

    def _joined(self, node: fx.Node) -> Distribution | None:
        given = Op(node).arguments
        parts = [self.found[i] for i in given["tensors"] if i in self.found]
        if len(parts) < len(given["tensors"]):
            return None
        axis = given["dim"] % _ndim(node)
        if all(part.axis == axis for part in parts):
            return joined(parts, axis)
        return collapsed(joined([collapsed(part) for part in parts], None))

    def _value(self, argument: Any) -> Any:
        """An argument of a node, with the model's tensor in place of the node that stands for it."""
        if not isinstance(argument, fx.Node):
            return argument
        value: Any = self.region
        for part in str(argument.target).split("."):
            value = getattr(value, part)
        return value.detach().cpu()


def layer_moments(layer: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a layer's outputs, [outputs], for independent inputs with those of [inputs].

    E[W x + b] = W E[x] + b and Var[W x + b] = W^2 Var[x], summed over the kernel's window. Borders are left aside; of a
    transposed convolution, the outputs between two inputs are averaged.
    """
    weight = weight_by_channel(layer).detach().double().cpu()
    share = transposed_share(layer)
    first = apply_to_constant(weight, mean.double()) * share
    variance = apply_to_constant(weight**2, std.double() ** 2) * share
    return first if layer.bias is None else first + layer.bias.detach().double().cpu(), variance.sqrt()


def transposed_share(layer: Any) -> float:
    """The share of its kernel's window that an output of a transposed convolution sees on average; 1 for others."""
    return 1 / math.prod(layer.stride) if getattr(layer, "transposed", False) else 1.0


def input_moments(node: fx.Node, x: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel that a layer reads, [inputs], of a tensor with this distribution."""
    layer: Any = module_of(node)
    if x.axis != channel_axis(node, node.all_input_nodes[0]):
        x = collapsed(x)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return x.mean.expand(channels), x.std.expand(channels)


def _for_channels(value: Any, channels: int) -> Any:
    """A function's parameter for each channel; their mean, where one channel stands for all."""
    return value.mean().reshape(1) if isinstance(value, Tensor) and value.numel() != channels else value


def _moved(node: fx.Node, x: Distribution) -> Distribution:
    """After an operator that moves, selects or averages values. An average's deviation is at most that of its terms."""
    if x.axis is None or kind_of(node) is K.IDENTITY:
        return x
    axis = Op(node).factor_axis(x.axis)
    if axis is None:
        return collapsed(x)
    channels = int(node.meta["val"].shape[axis])
    repeated = {
        name: getattr(x, name).repeat_interleave(channels // len(x.mean)) for name in ("mean", "std", "low", "high")
    }
    return Distribution(**repeated, axis=axis, measured=x.measured)


def _ndim(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)
