"""Layers of integers: exact sums of products, then scales and bias in the target's order of float32 operations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfeven.placement.quantized_layers import operation
from halfeven.quantization.arithmetic import per_channel
from halfeven.runtimes.openvino.exact_values import Products

EXACT_IN_FLOAT32 = 2.0**24
"""Integer sums below this are exact in float32; layers that could exceed it are summed in pieces or in float64."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a layer's integer weight, and the input channels that it reads: `count` of them from `start`."""

    weight: Tensor
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class ZeroShare:
    """What a zero point adds to the sums of a linear layer, [outputs] each: exactly, and as the runtime subtracts it.

    OpenVINO multiplies the zero point by the weights in float32, one input after the other. It is a little off an
    integer sometimes, and sums of many bytes are rounded when they become float32: single integers move.
    """

    exact: Tensor
    found: Tensor

    @staticmethod
    def of(weight: Tensor, zero_byte: Tensor) -> "ZeroShare":
        """The share of integer weights [outputs, inputs]."""
        products = (zero_byte * weight).numpy()
        one_by_one = np.cumsum(products, axis=1, dtype=np.float32)[:, -1]
        return ZeroShare(torch.round(zero_byte).double() * weight.double().sum(1), torch.from_numpy(one_by_one))

    def taken(self, sums: Tensor) -> Tensor:
        """Exact sums [..., outputs] as the runtime finds them."""
        return (sums.double() + self.exact).float() - self.found


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer with its integer weights at hand, called with the levels of its input.

    y = sum * (s_x * s_w) + bias, multiplied and then added in float32; the sum is exact. A bias of zeros is none.
    A runtime that sums products of bytes takes the zero point's share from them in float32 (`zero`).
    """

    compute: Callable[[Tensor, Tensor, None], Tensor]
    pieces: tuple[Piece, ...]
    input_axis: int
    zero_level: Tensor
    scale: Tensor
    bias: Tensor | None
    zero: "ZeroShare | None" = None

    @staticmethod
    def of(
        layer: Any, input_scale: Tensor, zero_level: Tensor, steps: int, zero_byte: Tensor | None = None
    ) -> "IntegerLayer":
        """The integers of a layer with an exported weight quantizer.

        Args:
            layer: a layer of `halfeven.placement.quantized_layers.QUANTIZED_LAYERS`, its weight on its grid.
            input_scale: of the levels that it reads, [].
            zero_level: the level that stands for 0, [].
            steps: the largest level.
            zero_byte: what stands for 0 in the bytes whose products a linear layer sums, as the runtime subtracts it,
                []; None: products of what has no zero point are summed.
        """
        quantizer = layer.weight_quantizer
        axis = None if quantizer.scale.ndim == 0 else quantizer.axis
        integers = torch.round(layer.weight / per_channel(quantizer.scale, axis, layer.weight.ndim))
        largest = max(float(zero_level), steps - float(zero_level))
        linear = isinstance(layer, nn.Linear)
        # Shapes that stand before the axes of the window: [outputs], or [batch, outputs, ...].
        after = () if linear else (1,) * (layer.weight.ndim - 2)

        def by_output(values: Tensor) -> Tensor:
            return values.reshape(-1, *after) if values.ndim else values

        return IntegerLayer(
            compute=operation(layer),
            pieces=tuple(_pieces(layer, integers, largest)),
            input_axis=-1 if linear else 1,
            zero_level=zero_level,
            scale=by_output(input_scale * quantizer.scale),
            bias=None if layer.bias is None or not bool(layer.bias.any()) else by_output(layer.bias),
            zero=None if zero_byte is None or not bool(zero_byte) else ZeroShare.of(integers, zero_byte),
        )

    def __call__(self, levels: Tensor) -> Tensor | Products:
        sums = self.sums(levels)
        products = Products(sums.float() if self.zero is None else self.zero.taken(sums), self.scale)
        if self.bias is not None:
            return products.real() + self.bias
        # The scales of a linear layer's outputs stand at the third axis of tokens: there the runtime merges none.
        tokens = self.input_axis == -1 and levels.ndim > 2 and self.scale.numel() > 1
        return products.real() if tokens else products

    def sums(self, levels: Tensor) -> Tensor:
        """The sums of integer products, exact; float64 where float32 could not hold them."""
        x = levels - self.zero_level
        if len(self.pieces) == 1:
            weight = self.pieces[0].weight
            return self.compute(x.to(weight.dtype), weight, None)
        total = torch.zeros((), dtype=torch.float64)
        for piece in self.pieces:
            part = self.compute(x.narrow(self.input_axis, piece.start, piece.count), piece.weight, None)
            total = total + part.double()
        return total


def _pieces(layer: Any, weight: Tensor, largest: float) -> list[Piece]:
    """An integer weight cut so that each piece can be summed exactly in float32; whole in float64 where it cannot.

    `largest` bounds the absolute values of the layer's input.
    """
    axis = 0 if getattr(layer, "transposed", False) else 1
    others = [a for a in range(weight.ndim) if a > 1]
    by_channel = weight.abs().sum(others) if others else weight.abs()
    bounds = by_channel.amax(1 - axis) * largest  # what an input channel can add to any output, at most
    if float(bounds.sum()) < EXACT_IN_FLOAT32:
        return [Piece(weight, 0, len(bounds))]
    if getattr(layer, "groups", 1) != 1 or float(bounds.max()) >= EXACT_IN_FLOAT32:
        return [Piece(weight.double(), 0, len(bounds))]
    pieces, start = [], 0
    while start < len(bounds):
        fits = int((bounds[start:].cumsum(0) < EXACT_IN_FLOAT32).sum())
        pieces.append(Piece(weight.narrow(axis, start, fits).contiguous(), start, fits))
        start += fits
    return pieces
