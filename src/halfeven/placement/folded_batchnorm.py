"""BatchNorm that is folded anew at every step of training, so that quantization sees the folded weights.

White paper, section 4.2: with one scale per tensor, the weights that are quantized in training must be those of the
deployed layer, BatchNorm's factor included. There, one convolution gives the batch's statistics and a second one, with
folded weights, the outputs. Here the one convolution has weights folded with the running statistics, and what BatchNorm
then divides by is corrected from these to the batch's own: the statistics of its outputs, undone by the factor, are
those of the first convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfeven.graph.batchnorm import foldable, output_axis, remove
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import module_of
from halfeven.quantization.arithmetic import per_channel

SMALLEST_FACTOR = 1e-6
"""Channels with a smaller factor tell nothing of the statistics before it; theirs stay as they are."""


def factor_of(norm: Any) -> Tensor:
    """What a BatchNorm in eval mode multiplies its input by, [channels], in float32."""
    inverse: Tensor = torch.rsqrt(norm.running_var + norm.eps)
    factor: Tensor = inverse if norm.weight is None else norm.weight * inverse
    return factor


def folded_weight(layer: Any) -> Tensor:
    """The weight that a layer computes with: its own, times the factor of the BatchNorm that is folded into it."""
    weight: Tensor = layer.weight
    if layer.live_norms:
        (norm, axis) = layer.live_norms
        weight = weight * per_channel(factor_of(norm), axis, weight.ndim)
    return weight


class _LiveFolded:
    """What a BatchNorm does whose factor is in the weights already: the rest."""

    layers: tuple[Any, ...] = ()

    def forward(self: Any, z: Tensor) -> Tensor:
        (layer,) = self.layers
        factor = factor_of(self)
        if not self.training:
            return z + per_channel(_shift(self, layer, factor), 1, z.ndim)
        axes = [axis for axis in range(z.ndim) if axis != 1]
        variance, mean = torch.var_mean(z, axes, correction=0)
        ratio, used = self._correction(variance, factor)
        self._follow(mean, variance, factor, used, z.numel() // z.shape[1], layer.bias)
        y = (z - per_channel(mean, 1, z.ndim)) * per_channel(ratio, 1, z.ndim)
        return y if self.bias is None else y + per_channel(self.bias, 1, z.ndim)

    def _correction(self: Any, variance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Running over batch standard deviation, and the channels that say something of it; each [channels]."""
        used = factor.detach().abs() > SMALLEST_FACTOR
        before = variance / torch.where(used, factor, 1.0).square()
        return torch.where(used, torch.sqrt((self.running_var + self.eps) / (before + self.eps)), 1.0), used

    @torch.no_grad()
    def _follow(
        self: Any, mean: Tensor, variance: Tensor, factor: Tensor, used: Tensor, count: int, bias: Tensor | None
    ) -> None:
        """Move the running statistics, which are those of the layer's outputs before the factor."""
        self.num_batches_tracked += 1
        momentum = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        safe = torch.where(used, factor, 1.0)
        mean = mean / safe if bias is None else mean / safe + bias
        unbiased = variance / safe.square() * (count / max(count - 1, 1))
        self.running_mean.copy_(torch.where(used, torch.lerp(self.running_mean, mean, momentum), self.running_mean))
        self.running_var.copy_(torch.where(used, torch.lerp(self.running_var, unbiased, momentum), self.running_var))


class LiveFoldedBatchNorm1d(_LiveFolded, nn.BatchNorm1d):
    """`nn.BatchNorm1d` after a layer that its factor is folded into."""


class LiveFoldedBatchNorm2d(_LiveFolded, nn.BatchNorm2d):
    """`nn.BatchNorm2d` after a layer that its factor is folded into."""


class LiveFoldedBatchNorm3d(_LiveFolded, nn.BatchNorm3d):
    """`nn.BatchNorm3d` after a layer that its factor is folded into."""


LIVE_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: LiveFoldedBatchNorm1d,
    nn.BatchNorm2d: LiveFoldedBatchNorm2d,
    nn.BatchNorm3d: LiveFoldedBatchNorm3d,
}


def fold_live(region: CapturedModule) -> None:
    """Let every quantized layer of a region compute with the weight that the BatchNorm after it is folded into."""
    for layer_node, norm_node in foldable(region.graph):
        layer: Any = module_of(layer_node)
        norm: Any = module_of(norm_node)
        if not hasattr(layer, "weight_quantizer") or type(norm) not in LIVE_FOLDED:
            continue
        norm.__class__ = LIVE_FOLDED[type(norm)]
        # In tuples, so that neither becomes a submodule of the other.
        layer.live_norms, norm.layers = (norm, output_axis(layer_node)), (layer,)


def unfold_live(layer: Any) -> None:
    """Let a layer compute with its own weight again, and the BatchNorm after it as BatchNorm does."""
    if layer.live_norms:
        norm, _ = layer.live_norms
        norm.__class__ = next(plain for plain, folded in LIVE_FOLDED.items() if type(norm) is folded)
        norm.layers = ()
        layer.live_norms = ()


def settle_live(region: CapturedModule) -> None:
    """Take out of a region the BatchNorms that are folded live, in place; what it computes in eval mode stays.

    The weights become the folded ones, and the biases what was left for BatchNorm to add.
    """
    for layer_node, norm_node in foldable(region.graph):
        layer: Any = module_of(layer_node)
        norm: Any = module_of(norm_node)
        if not isinstance(norm, _LiveFolded):
            continue
        shift = _shift(norm, layer, factor_of(norm)).detach()
        layer.weight = nn.Parameter(folded_weight(layer).detach(), requires_grad=False)
        layer.bias, layer.live_norms = nn.Parameter(shift, requires_grad=False), ()
        remove(region, norm_node)
    region.recompile()


def _shift(norm: Any, layer: Any, factor: Tensor) -> Tensor:
    """What a BatchNorm in eval mode adds to the outputs of the layer with folded weights, [channels]."""
    mean: Tensor = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
    return -factor * mean if norm.bias is None else norm.bias - factor * mean
