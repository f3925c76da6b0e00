"""Compute convolutions with few output positions as matrix products.

oneDNN reorders a convolution's weight into a layout of its own at each call, forward and backward. That pays where many
positions use the weight; the last layers of a network have a few positions and millions of weights.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

MAX_POSITIONS = 4
"""Largest number of output positions of a sample for which the product is faster: 17 ms against 27 for a step of 512 by
512 channels, 3 x 3, at 2 x 2 positions, and no faster at 4 x 4."""


def has_few_positions(layer: nn.Module, x: Tensor) -> bool:
    """Return True for a convolution that `conv_as_matmul` computes faster, given its input x."""
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or isinstance(layer.padding, str) or x.ndim != 4:
        return False
    height, width = _output_size(layer, x)
    return x.device.type == "cpu" and layer.padding_mode == "zeros" and height * width <= MAX_POSITIONS


def conv_as_matmul(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return the layer's convolution of x with a weight, computed as one matrix product.

    Args:
        layer: a `Conv2d` of one group, with padding by zeros.
        x: [batch, input channels, height, width].
        weight: [output channels, input channels, kernel height, kernel width], in place of the layer's own.

    Returns:
        [batch, output channels, output height, output width].
    """
    # im2col: each output position becomes a column with the inputs under its window, [batch, channels * kernel,
    # positions].
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    flat = columns.transpose(0, 1).reshape(columns.shape[1], -1)  # [channels * kernel, batch * positions]
    # All positions of all samples are columns of one product, so the weight is read once.
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
