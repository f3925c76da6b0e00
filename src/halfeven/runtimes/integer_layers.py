"""Layers of integers: exact sums of products, which each runtime scales and adds a bias to in its own order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.placement.quantized_layers import operation
from halfeven.quantization.arithmetic import per_channel

EXACT_IN_FLOAT32 = 2.0**24
"""Integer sums below this are exact in float32; a layer that could exceed it is summed in pieces or in float64."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a layer's integer weight, and the input channels that it reads: `count` of them from `start`."""

    weight: Tensor
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer with its integer weights at hand: y = sum * (s_x * s_w) + bias, of which the sum is exact."""

    compute: Callable[[Tensor, Tensor, None], Tensor]
    pieces: tuple[Piece, ...]
    input_axis: int
    zero_code: Tensor
    scale: Tensor
    bias: Tensor | None
    """None also where the layer has a bias of zeros."""

    @staticmethod
    def of(layer: Any, input_scale: Tensor, zero_code: Tensor, largest_code: int) -> "IntegerLayer":
        """Return the integers of a layer with an exported weight quantizer.

        Args:
            layer: a layer of `halfeven.placement.quantized_layers.QUANTIZED_LAYERS`, its weight on its grid.
            input_scale: of the codes that it reads, [].
            zero_code: the code that stands for 0, [].
            largest_code: the largest code that the layer can read.
        """
        quantizer = layer.weight_quantizer
        integers = integer_weight(layer)
        largest = max(float(zero_code), largest_code - float(zero_code))
        linear = isinstance(layer, nn.Linear)
        # Shapes that stand before the axes of the window: [outputs], or [batch, outputs, ...].
        after = () if linear else (1,) * (layer.weight.ndim - 2)

        def by_output(values: Tensor) -> Tensor:
            return values.reshape(-1, *after) if values.ndim else values

        return IntegerLayer(
            compute=operation(layer),
            pieces=tuple(_exact_pieces(layer, integers, largest)),
            input_axis=-1 if linear else 1,
            zero_code=zero_code,
            scale=by_output(input_scale * quantizer.scale),
            bias=None if layer.bias is None or not bool(layer.bias.any()) else by_output(layer.bias),
        )

    def sums(self, codes: Tensor) -> Tensor:
        """Return the exact sums of integer products; float64 where float32 could not hold them."""
        # Codes count from 0. Less the code of 0 they are the integers that the weights multiply.
        x = codes - self.zero_code
        if len(self.pieces) == 1:
            weight = self.pieces[0].weight
            return self.compute(x.to(weight.dtype), weight, None)
        total = torch.zeros((), dtype=torch.float64)
        for piece in self.pieces:
            part = self.compute(x.narrow(self.input_axis, piece.start, piece.count), piece.weight, None)
            total = total + part.double()
        return total


def integer_weight(layer: Any) -> Tensor:
    """Return the integers of a layer's weight, which lies on its quantizer's grid; in the weight's shape."""
    quantizer = layer.weight_quantizer
    axis = None if quantizer.scale.ndim == 0 else quantizer.axis
    return torch.round(layer.weight / per_channel(quantizer.scale, axis, layer.weight.ndim))


def _exact_pieces(layer: Any, weight: Tensor, largest: float) -> list[Piece]:
    """Cut an integer weight so that each piece can be summed exactly in float32; where it cannot, keep it in float64.

    `largest` bounds the absolute values of the layer's input.
    """
    axis = 0 if getattr(layer, "transposed", False) else 1
    # Axis 0 or 1 has the inputs, the other the outputs; all further axes are the kernel's window.
    others = [a for a in range(weight.ndim) if a > 1]
    by_channel = weight.abs().sum(others) if others else weight.abs()
    bounds = by_channel.amax(1 - axis) * largest  # what an input channel can add to any output, at most
    if float(bounds.sum()) < EXACT_IN_FLOAT32:
        return [Piece(weight, 0, len(bounds))]
    # A group reads channels of its own, which a cut through all channels would tear apart; and a single channel whose
    # sum may exceed 2^24 can be cut no further.
    if getattr(layer, "groups", 1) != 1 or float(bounds.max()) >= EXACT_IN_FLOAT32:
        return [Piece(weight.double(), 0, len(bounds))]
    pieces = []
    start = 0
    while start < len(bounds):
        # As many channels as float32 can sum exactly, whatever the inputs; the sums of the pieces are added in float64.
        fits = int((bounds[start:].cumsum(0) < EXACT_IN_FLOAT32).sum())
        pieces.append(Piece(weight.narrow(axis, start, fits).contiguous(), start, fits))
        start += fits
    return pieces
