"""Extend the standard layers so that they read their weight through a quantizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfeven.graph.torch_private import convolution_of
from halfeven.placement.folded_batchnorm import folded_weight
from halfeven.quantization.arithmetic import per_channel
from halfeven.quantization.quantizer import Mode, Quantizer

FP16_HEADROOM = 2.0**-10
"""Factor on integer weights under float16, whose largest number is 65504. It is a power of two, so the products stay
exact."""


def operation(layer: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the function of (input, weight, bias) that a layer computes, with its stride, padding and groups."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if not layer.transposed:
        return convolution_of(layer)
    transpose: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[layer.weight.ndim - 3]
    return lambda x, weight, bias: transpose(
        x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    )


def output_channels(layer: Any) -> int:
    """Return the number of a layer's output channels."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def run_quantized(layer: Any, x: Tensor) -> Tensor:
    """Run a layer of `QUANTIZED_LAYERS` with its quantized weight.

    Where the device multiplies with fewer bits than float32 (TF32, float16, bfloat16), the layer multiplies integers,
    which are exact there, and applies the scales to the result. Multiplying scaled values instead makes 1 to 11 % of a
    layer's integers wrong.
    """
    compute = operation(layer)
    real_weight = folded_weight(layer)
    weight = layer.weight_quantizer(real_weight)
    # The shift of a live BatchNorm contains the bias.
    bias = None if layer.live_norms else _bias_to_add(layer, x, real_weight)
    if not (layer.input_quantizers and _low_precision(x)):
        return compute(x, weight, bias)
    (quantizer,) = layer.input_quantizers
    if Mode.QUANTIZE is not quantizer.mode or Mode.QUANTIZE is not layer.weight_quantizer.mode:
        return compute(x, weight, bias)
    # 8-bit integers, less a zero point, are at most 255 from 0: exact in float16 and TF32 (all integers to 2048) and in
    # bfloat16 (to 256).
    # (x / scale_x) (weight / scale_w) scale_x scale_w: both scales cancel, so they need no gradient here.
    scale_x = quantizer.used_scale(x)
    scale_w = layer.weight_quantizer.used_scale(real_weight)
    headroom = FP16_HEADROOM if _compute_dtype(x) is torch.float16 else 1.0
    # Both tensors lie on their grids, so the quotients are integers but for float32's rounding, which the conversion to
    # a narrower type takes away.
    integer_weight = weight / per_channel(scale_w, layer.weight_quantizer.scheme.axis, weight.ndim) * headroom
    axis = -1 if isinstance(layer, nn.Linear) else 1
    dtype = _compute_dtype(x)
    result = compute((x / scale_x).to(dtype), integer_weight.to(dtype), None)
    result = result * per_channel(scale_x * scale_w / headroom, axis if scale_w.ndim else None, result.ndim).to(
        x.device
    )
    if bias is not None:
        result = result + per_channel(bias, axis, result.ndim)
    return result.to(_compute_dtype(x))


def _bias_to_add(layer: Any, x: Tensor, weight: Tensor) -> Tensor | None:
    """Return the layer's bias, rounded to the grid of the products (scale_x * scale_w) if the runtime adds integers.

    The gradient passes straight through the rounding.
    """
    bias: Tensor | None = layer.bias
    if bias is None or not layer.int32_bias or not layer.input_quantizers:
        return bias
    (quantizer,) = layer.input_quantizers
    both = (quantizer, layer.weight_quantizer)
    if any(part.mode is not Mode.QUANTIZE or not part.state.has_range for part in both):
        return bias
    unit = quantizer.used_scale(x) * layer.weight_quantizer.used_scale(weight)
    # White paper, section 2.1: int32 biases have the scale s_x s_w of the accumulator. Straight-through: the term in
    # parentheses has no gradient.
    rounded: Tensor = bias + (torch.round(bias.detach() / unit) * unit - bias.detach())
    return rounded


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _low_precision(x: Tensor) -> bool:
    if _compute_dtype(x) in (torch.float16, torch.bfloat16):
        return True
    return x.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


class QuantizedLayer:
    """The fields that a layer with a quantized weight has in addition to the float layer's.

    The state dict contains the weight's quantizer, and no other of these fields.
    """

    weight_quantizer: Quantizer
    input_quantizers: tuple[Quantizer, ...] = ()
    """The input's quantizer, whose scale turns the input back into integers; a tuple, so that it is no submodule."""
    int32_bias: bool = False
    """The runtime adds biases as 32-bit integers on the grid of the products."""
    live_norms: tuple[Any, ...] = ()
    """The BatchNorm that is folded into the weight at every step, and the axis of the weight that it scales."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return run_quantized(self, input)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """`nn.Conv1d` with a quantized weight."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with a quantized weight."""


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """`nn.Conv3d` with a quantized weight."""


class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a quantized weight."""


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a quantized weight."""


class QuantizedConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a quantized weight."""


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with a quantized weight."""


QUANTIZED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
}
"""Float layer -> the same layer with a quantized weight."""

FLOAT_LAYERS = {quantized: layer for layer, quantized in QUANTIZED_LAYERS.items()}
"""Layer with a quantized weight -> the same float layer."""
