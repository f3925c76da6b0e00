"""Fold BatchNorm anew at every step of training, so that quantization sees the folded weights.

White paper, section 4.2: with a scale per tensor, training must quantize the weights of the deployed layer, which
include BatchNorm's factor. The usual method runs two convolutions: the first yields the batch's statistics, the second
has folded weights and yields the outputs. This module runs a single convolution, whose weights are folded with the
running statistics. Dividing the statistics of its outputs by the factor gives the statistics that the first convolution
would yield, and the outputs are then corrected from the running to the batch's standard deviation.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.graph.batchnorm import foldable, output_axis, remove_module
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, module_calls, module_of
from halfeven.quantization.arithmetic import per_channel
from halfeven.quantization.model_quantizers import has_quantized_weight

SMALLEST_FACTOR = 1e-6
"""Smallest factor that is divided by. The statistics of channels with a smaller factor stay as they are."""


def factor_of(norm: Any) -> Tensor:
    """Return the factor gamma / sqrt(running_var + eps) of a BatchNorm in eval mode, [channels], in float32."""
    inverse: Tensor = torch.rsqrt(norm.running_var + norm.eps)
    factor: Tensor = inverse if norm.weight is None else norm.weight * inverse
    return factor


def folded_weight(layer: Any) -> Tensor:
    """Return a layer's weight, times the factor of the BatchNorm that is folded into it where there is any."""
    weight: Tensor = layer.weight
    if layer.live_norms:
        (norm, axis) = layer.live_norms
        weight = weight * per_channel(factor_of(norm), axis, weight.ndim)
    return weight


class _LiveFolded:
    """The part of BatchNorm that remains when the weights already contain its factor."""

    layers: tuple[Any, ...] = ()

    def forward(self: Any, z: Tensor) -> Tensor:
        (layer,) = self.layers
        factor = factor_of(self)
        if not self.training:
            # The weights have the whole factor of eval mode in them: only the shift is left.
            return z + per_channel(_eval_shift(self, layer, factor), 1, z.ndim)
        # z = factor * x, x without the layer's bias, and factor = gamma / running sigma. BatchNorm divides by the batch
        # sigma instead: y = (z - mean(z)) * running sigma / batch sigma + beta.
        axes = [axis for axis in range(z.ndim) if axis != 1]
        variance, mean = torch.var_mean(z, axes, correction=0)
        ratio, used = self._correction(variance, factor)
        self._update_statistics(mean, variance, factor, used, z.numel() // z.shape[1], layer.bias)
        y = (z - per_channel(mean, 1, z.ndim)) * per_channel(ratio, 1, z.ndim)
        return y if self.bias is None else y + per_channel(self.bias, 1, z.ndim)

    def _correction(self: Any, variance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return running / batch standard deviation and the mask of channels with a usable factor, each [channels]."""
        # Where gamma is almost 0, z is almost 0 whatever x is: its statistics say nothing about those of x.
        used = factor.detach().abs() > SMALLEST_FACTOR
        # z = factor * x, so Var[x] = Var[z] / factor^2; running / batch sigma, each with eps, as BatchNorm has it.
        before = variance / torch.where(used, factor, 1.0).square()
        return torch.where(used, torch.sqrt((self.running_var + self.eps) / (before + self.eps)), 1.0), used

    @torch.no_grad()
    def _update_statistics(
        self: Any, mean: Tensor, variance: Tensor, factor: Tensor, used: Tensor, count: int, bias: Tensor | None
    ) -> None:
        """Update the running statistics, which describe the layer's outputs without the factor, with its bias."""
        self.num_batches_tracked += 1
        # As in `nn.BatchNorm2d`: without momentum, the plain mean over all batches.
        momentum = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        # The mean of x is that of z over the factor, plus the layer's bias, which z lacks; a bias does not change the
        # variance.
        safe = torch.where(used, factor, 1.0)
        mean = mean / safe if bias is None else mean / safe + bias
        unbiased = variance / safe.square() * (count / max(count - 1, 1))  # as BatchNorm keeps the variance
        self.running_mean.copy_(torch.where(used, torch.lerp(self.running_mean, mean, momentum), self.running_mean))
        self.running_var.copy_(torch.where(used, torch.lerp(self.running_var, unbiased, momentum), self.running_var))


class LiveFoldedBatchNorm1d(_LiveFolded, nn.BatchNorm1d):
    """`nn.BatchNorm1d` after a layer whose weights contain its factor."""


class LiveFoldedBatchNorm2d(_LiveFolded, nn.BatchNorm2d):
    """`nn.BatchNorm2d` after a layer whose weights contain its factor."""


class LiveFoldedBatchNorm3d(_LiveFolded, nn.BatchNorm3d):
    """`nn.BatchNorm3d` after a layer whose weights contain its factor."""


LIVE_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: LiveFoldedBatchNorm1d,
    nn.BatchNorm2d: LiveFoldedBatchNorm2d,
    nn.BatchNorm3d: LiveFoldedBatchNorm3d,
}


def fold_live(region: CapturedModule) -> None:
    """Fold, at every step from now on, the BatchNorm after each quantized layer of a region into its weight.

    A BatchNorm that other layers, or a sum, are normalized by too stays as it is.
    """
    pairs = foldable(region.graph)
    readings = Counter(Op(norm).path for _, norm in pairs)
    calls = Counter(op.path for op in module_calls(region.graph))
    for layer_node, norm_node in pairs:
        layer: Any = module_of(layer_node)
        norm: Any = module_of(norm_node)
        # A pair is folded only if both modules are called in this place alone: a second caller would read a weight with
        # the factor in it, or a BatchNorm without.
        own = readings[Op(norm_node).path] == calls[Op(norm_node).path] == calls[Op(layer_node).path]
        if not own or not has_quantized_weight(layer) or type(norm) not in LIVE_FOLDED:
            continue
        # The class is changed in place, so that the parameters, the state dict and references to the module stay valid.
        norm.__class__ = LIVE_FOLDED[type(norm)]
        # In tuples, so that neither becomes a submodule of the other.
        layer.live_norms = (norm, output_axis(layer_node))
        norm.layers = (layer,)


def unfold_live(layer: Any) -> None:
    """Undo `fold_live` for a layer: it computes with its own weight again, and the BatchNorm in full."""
    if layer.live_norms:
        norm, _ = layer.live_norms
        norm.__class__ = next(plain for plain, folded in LIVE_FOLDED.items() if type(norm) is folded)
        norm.layers = ()
        layer.live_norms = ()


def settle_live(region: CapturedModule) -> None:
    """Fold the BatchNorms that are folded live for good, in place; the outputs in eval mode stay.

    The layers' weights are multiplied by the factors, and their biases become the shifts that the BatchNorms added.
    """
    for layer_node, norm_node in foldable(region.graph):
        layer: Any = module_of(layer_node)
        norm: Any = module_of(norm_node)
        if not isinstance(norm, _LiveFolded):
            continue
        if layer.live_norms:  # else the layer is called several times, and this is not its first call
            shift = _eval_shift(norm, layer, factor_of(norm)).detach()
            layer.weight = nn.Parameter(folded_weight(layer).detach(), requires_grad=False)
            layer.bias = nn.Parameter(shift, requires_grad=False)
            layer.live_norms = ()
        remove_module(region, norm_node)
    region.recompile()


def _eval_shift(norm: Any, layer: Any, factor: Tensor) -> Tensor:
    """Return the shift that a BatchNorm in eval mode adds to outputs made with folded weights, [channels]."""
    # gamma (W x + b - mean) / sigma + beta = (factor W) x + beta - factor (mean - b).
    mean: Tensor = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
    return -factor * mean if norm.bias is None else norm.bias - factor * mean
