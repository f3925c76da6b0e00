"""Convolutions with few output positions as matrix products.

oneDNN brings a convolution's weight into a layout of its own at each call, forward and backward. That pays where many
positions use it; the last layers of a network have a handful of positions and millions of weights.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4
"""Output positions of an image up to which the product is the faster form: 17 ms against 27 for a step of 512 by 512
channels, 3 x 3, at 2 x 2 positions, and no faster at 4 x 4."""


def has_few_positions(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a convolution that `by_product` computes faster."""
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or isinstance(layer.padding, str) or x.ndim != 4:
        return False
    height, width = _output_size(layer, x)
    return x.device.type == "cpu" and layer.padding_mode == "zeros" and height * width <= FEW


def by_product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's convolution of x, [batch, channels, height, width], with a weight, as one matrix product."""
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    flat = columns.transpose(0, 1).reshape(columns.shape[1], -1)  # [channels * kernel, batch * positions]
    product = (weight.flatten(1) @ flat).view(weight.shape[0], x.shape[0], -1).transpose(0, 1)
    result = product.reshape(x.shape[0], weight.shape[0], *_output_size(layer, x))
    return result if layer.bias is None else result + layer.bias[:, None, None]


def _output_size(layer: Any, x: Tensor) -> tuple[int, int]:
    height, width = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
    return height, width
