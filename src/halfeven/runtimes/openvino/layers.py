"""Layers of integers as OpenVINO's CPU plugin scales them: products in float32, then the bias."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfeven.runtimes.cpu import has_avx512_vnni
from halfeven.runtimes.integer_layers import IntegerLayer, integer_weight
from halfeven.runtimes.openvino.exact_values import Accumulator, FakeQuantizeRange, Shifted


@dataclass(frozen=True, eq=False)
class ZeroShare:
    """The share of a zero point in the sums of a linear layer, [outputs]: exact, and as the plugin subtracts it.

    The plugin multiplies the zero point by the weights in float32, one input after the other. It is a little off an
    integer sometimes, and sums of many bytes are rounded when they become float32: single integers move.
    """

    exact: Tensor
    found: Tensor

    @staticmethod
    def of(weight: Tensor, zero_byte: Tensor) -> "ZeroShare":
        """Return the share of integer weights [outputs, inputs]."""
        products = (zero_byte * weight).numpy()
        one_by_one = np.cumsum(products, axis=1, dtype=np.float32)[:, -1]
        return ZeroShare(torch.round(zero_byte).double() * weight.double().sum(1), torch.from_numpy(one_by_one))

    def taken(self, sums: Tensor) -> Tensor:
        """Return exact sums [..., outputs] as the plugin finds them."""
        # The layer's sums are of codes less the zero code. With the exact share they are sums of bytes again, which the
        # plugin rounds to float32 before it subtracts the share that it has found.
        return (sums.double() + self.exact).float() - self.found


@dataclass(frozen=True, eq=False)
class OpenVINOLayer:
    """A layer of integers, called with the codes of its input.

    y = sum * (s_x * s_w) + bias, multiplied and then added in float32; the sum is exact. The plugin sums products of
    bytes in a linear layer, and takes the zero point's share from them in float32 (`zero`).
    """

    layer: IntegerLayer
    zero: ZeroShare | None

    @staticmethod
    def of(layer: Any, limits: FakeQuantizeRange) -> "OpenVINOLayer":
        """Return the integers of a layer with an exported weight quantizer, whose input has these limits."""
        integers = IntegerLayer.of(layer, limits.scale, limits.zero_code, limits.steps)
        summed_bytes = isinstance(layer, nn.Linear) and bool(limits.zero_byte)
        return OpenVINOLayer(integers, ZeroShare.of(integer_weight(layer), limits.zero_byte) if summed_bytes else None)

    def __call__(self, codes: Tensor) -> Tensor | Accumulator | Shifted:
        layer = self.layer
        sums = layer.sums(codes)
        products = Accumulator(sums.float() if self.zero is None else self.zero.taken(sums), layer.scale)
        # The scales of a linear layer's outputs stand at the third axis of tokens: there the plugin merges none.
        tokens = layer.input_axis == -1 and codes.ndim > 2 and layer.scale.numel() > 1
        if layer.bias is None:
            return products.real() if tokens else products
        number = layer.bias.flatten()[0]
        # Seen with AVX512-VNNI; on other processors it was not looked for.
        if tokens and has_avx512_vnni() and bool((layer.bias == number).all()):
            return Shifted(products.real(), number)
        return products.real() + layer.bias
