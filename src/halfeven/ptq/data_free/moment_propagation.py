"""Propagation of moments: the distributions of all tensors of a graph, without data.

A channel after BatchNorm has mean beta and standard deviation |gamma| (white paper, section 3.1, arXiv:2106.08295);
the moments of all other tensors follow from these through the operators in between.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.batchnorm import kept_statistics, statistics
from halfeven.graph.layer_shapes import channel_axis
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, operations
from halfeven.placement.channel_clip import ChannelClip
from halfeven.ptq.data_free.moments import (
    Distribution,
    after_clip,
    after_concatenation,
    after_function,
    after_scaling,
    after_sum,
    collapsed,
    constant_distribution,
    gaussian,
    multiplied,
)
from halfeven.ptq.equalization.layer_pairs import apply_to_constant, weight_by_channel
from halfeven.quantization.quantizer import Quantizer
from halfeven.renamed import renamed_attributes

K = OperatorKind


@dataclass(frozen=True, kw_only=True)
class InputDistribution:
    """Assumed distribution of a model's inputs. The defaults fit inputs that were normalized over a data set."""

    mean: float = 0.0
    std: float = 1.0
    low: float = -3.0
    """Smallest value: a normalized image does not reach 3 standard deviations."""
    high: float = 3.0
    """Largest value."""

    def distribution(self) -> Distribution:
        """Return these numbers as the distribution of every channel."""
        numbers = torch.tensor([[self.mean], [self.std], [self.low], [self.high]], dtype=torch.float64)
        mean, std, low, high = numbers.unbind()
        return Distribution(mean, std, low, high, measured=False)


NORMALIZED = InputDistribution()
"""Inputs that were normalized to mean 0 and standard deviation 1."""


def propagated(
    region: CapturedModule, *, alpha: float = 6.0, inputs: InputDistribution | None = NORMALIZED
) -> dict[fx.Node, Distribution]:
    """Return the distribution of each tensor of a graph; a tensor of unknown distribution has no entry.

    Args:
        region: a graph, with or without quantizers.
        alpha: standard deviations on each side that an extent covers (white paper, section 3.1).
        inputs: assumed distribution of the graph's inputs; None: unknown.
    """
    found: dict[fx.Node, Distribution] = {}
    walk = _Propagation(found, alpha, inputs)
    for op in operations(region.graph):
        # Nodes come in the order of execution, so the operands of each are known by now, or stay unknown.
        if op.is_float_tensor and (known := walk.distribution(op)) is not None:
            found[op.node] = known
    return found


@dataclass(frozen=True)
class _Propagation:
    """The distributions found so far; each operator comes after those that it reads."""

    found: dict[fx.Node, Distribution]
    alpha: float
    inputs: InputDistribution | None

    def distribution(self, op: Op) -> Distribution | None:
        """Return the distribution of an operator's result; None where it is unknown."""
        kind = op.kind
        if kind is K.INPUT:
            return None if self.inputs is None else self.inputs.distribution()
        if kind in (K.ADD, K.MULTIPLY):
            return self._after_two_operands(op)
        if kind is K.CONCAT:
            return self._after_concat(op)
        x = self.found.get(op.inputs[0].node) if op.inputs else None
        if op.is_module:
            return self._after_module(op, op.module, x)
        return None if x is None else self._after_function(op, x)

    def _after_module(self, op: Op, module: Any, x: Distribution | None) -> Distribution | None:
        """Return the distribution behind a module.

        A normalization fixes the moments of its outputs, whatever its input.
        """
        kind = op.kind
        if kind is K.IDENTITY or isinstance(module, Quantizer):
            return x
        if isinstance(module, ChannelClip):
            return None if x is None else after_clip(x, module.low.flatten(), module.high.flatten())
        # A BatchNorm that was folded into this layer: its beta and |gamma| are the moments of the layer's outputs.
        if (kept := kept_statistics(module)) is not None:
            return gaussian(*kept, self.alpha, channel_axis(op.node, op.node), True)
        if kind is K.BATCH_NORM:
            mean, std = statistics(module)
            return gaussian(mean, std, self.alpha, 1, True)
        if kind is K.NORMALIZATION and module.weight is not None:
            return self._after_normalization(op, module)
        if kind not in WEIGHTED or x is None:
            return None
        # No BatchNorm tells the moments of this layer: they are estimated from its weights.
        mean, std = layer_moments(module, *input_moments(op.node, x))
        return gaussian(mean, std, self.alpha, channel_axis(op.node, op.node), False)

    def _after_normalization(self, op: Op, module: Any) -> Distribution | None:
        if module.weight.ndim != 1:
            return None
        mean = torch.zeros_like(module.weight) if module.bias is None else module.bias
        axis = 1 if isinstance(module, nn.GroupNorm) else op.ndim - 1
        # LayerNorm and GroupNorm end with gamma x + beta on values of mean 0 and variance 1 over a sample. As of
        # BatchNorm, beta and |gamma| are taken for the moments of a channel.
        return gaussian(mean, module.weight.abs(), self.alpha, axis, True)

    def _after_function(self, op: Op, x: Distribution) -> Distribution | None:
        """Return the distribution behind a function of one tensor; None if it is unknown."""
        # A clip has moments in closed form; other activation functions are integrated numerically.
        if (bounds := op.bounds) is not None:
            return after_clip(x, *bounds)
        if op.kind is K.ACTIVATION:
            rest = [_for_channels(_tensor_of(argument), len(x.mean)) for argument in op.node.args[1:]]
            return after_function(x, lambda values: op.function(values.float(), *rest, **op.node.kwargs).double())
        if op.kind in (K.SAME_SCALE, K.IDENTITY, K.AVERAGE, K.PAD, K.INTERPOLATION):
            return _after_mover(op, x)
        return None

    def _after_two_operands(self, op: Op) -> Distribution | None:
        """Return the distribution of a sum, difference or product.

        An operand is a tensor, a number, or a constant of the model.
        """
        operands = [self._operand_distribution(op, operand) for operand in op.node.args[:2]]
        # One unknown operand makes the result unknown: a guess would set a wrong range.
        if any(operand is None for operand in operands) or len(operands) < 2:
            return None
        a, b = operands
        assert a is not None
        assert b is not None
        if op.kind is K.MULTIPLY:
            return multiplied(a, b)
        sign = -1.0 if op.row.subtracts else 1.0
        return after_sum(a, after_scaling(b, sign * float(op.arguments.get("alpha", 1))), self.alpha)

    def _operand_distribution(self, op: Op, operand: Any) -> Distribution | None:
        """Return the distribution of an operand, aligned with the axes of the result; None if it is unknown."""
        if not isinstance(operand, fx.Node):
            return constant_distribution(operand) if isinstance(operand, int | float) else None
        read = Op(operand)
        if read.is_constant:
            return constant_distribution(_tensor_of(operand))
        x = self.found.get(operand)
        # Broadcasting aligns axes at the end, so that with another number of axes the channel's axis means another
        # axis.
        return collapsed(x) if x is not None and read.ndim != op.ndim else x

    def _after_concat(self, op: Op) -> Distribution | None:
        tensors = op.argument("tensors")
        parts = [self.found[tensor] for tensor in tensors if tensor in self.found]
        if len(parts) < len(tensors):
            return None
        axis = op.argument("dim") % op.ndim
        # Channels are appended where the parts are joined along their channels. Joined along another axis, they are
        # mixed.
        if all(part.axis == axis for part in parts):
            return after_concatenation(parts, axis)
        return collapsed(after_concatenation([collapsed(part) for part in parts], None))


def _tensor_of(argument: Any) -> Any:
    """Return an operator's argument, with the model's tensor in place of the node that stands for it."""
    return Op(argument).constant.detach().cpu() if isinstance(argument, fx.Node) else argument


def layer_moments(layer: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a layer's outputs, [outputs] each, for independent inputs.

    E[W x + b] = W E[x] + b and Var[W x + b] = W^2 Var[x], summed over the kernel's window. Borders are left aside; of a
    transposed convolution, the outputs between two inputs are averaged.

    Args:
        layer: a convolution, transposed convolution or linear module.
        mean, std: moments of its inputs, [inputs] each.
    """
    weight = weight_by_channel(layer).detach().double().cpu()
    share = transposed_share(layer)
    first = apply_to_constant(weight, mean.double()) * share
    # Var[sum_i w_i x_i] = sum_i w_i^2 Var[x_i] for independent inputs.
    variance = apply_to_constant(weight**2, std.double() ** 2) * share
    return first if layer.bias is None else first + layer.bias.detach().double().cpu(), variance.sqrt()


def transposed_share(layer: Any) -> float:
    """Return the average fraction of its kernel that an output of a transposed convolution sees; 1 for other layers."""
    return 1 / math.prod(layer.stride) if getattr(layer, "transposed", False) else 1.0


def input_moments(node: fx.Node, x: Distribution) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel that a layer reads, [inputs] each.

    Args:
        node: the layer's call.
        x: distribution of its input.
    """
    op = Op(node)
    layer: Any = op.module
    # The layer sums over another axis than the known channels lie on: each of its inputs is then the mixture of them.
    if x.axis != channel_axis(node, op.inputs[0].node):
        x = collapsed(x)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return x.mean.expand(channels), x.std.expand(channels)


def _for_channels(value: Any, channels: int) -> Any:
    """Return a function's parameter for each channel, or their mean where one channel stands for all."""
    return value.mean().reshape(1) if isinstance(value, Tensor) and value.numel() != channels else value


def _after_mover(op: Op, x: Distribution) -> Distribution:
    """Return the distribution after an operator that moves, selects or averages values.

    The standard deviation of an average is at most that of its terms, which is taken for it.
    """
    if x.axis is None or op.kind is K.IDENTITY:
        return x
    axis = op.factor_axis(x.axis)
    if axis is None:
        return collapsed(x)
    # Flattening [channels, h, w] to features repeats each channel's moments for its h * w features.
    channels = int(op.shape[axis])
    repeated = {
        name: getattr(x, name).repeat_interleave(channels // len(x.mean)) for name in ("mean", "std", "low", "high")
    }
    return Distribution(**repeated, axis=axis, measured=x.measured)


__getattr__ = renamed_attributes(__name__, Inputs="ptq.data_free.moment_propagation.InputDistribution")
