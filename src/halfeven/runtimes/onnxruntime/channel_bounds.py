"""Bounds of each channel as sums of integers, which saturate.

The runtime has no minimum of 8-bit integers: it computes a minimum in float, between two conversions. It has a kernel
for sums of 8-bit integers on a common scale, whose results saturate at the ends of the type: with d = 255 - q,
min(x, q) = min(x + d, 255) - d, exactly.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.deployment.grids import grid_of, quantizer_at
from halfeven.deployment.quantize_op import ExportedQuantizer, twin_of
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import Op, record_value

aten = torch.ops.aten


def write_bounds_as_sums(region: CapturedModule, exported: list[ExportedQuantizer], prefix: str) -> None:
    """Write minima and maxima of a quantized tensor and a constant on its grid as two sums each, in place.

    Args:
        region: a part of a deployed model.
        exported: the model's quantizers, to which those of the constants and of the sums are added.
        prefix: path of the region in the model, with a dot at its end; "" for the whole model.
    """
    for node in list(region.graph.nodes):
        if node.target not in (aten.minimum.default, aten.maximum.default):
            continue
        x, constant = node.args
        grid = grid_of(x)
        if grid is not None and Op(constant).is_constant and _is_on_grid(Op(constant).constant, grid):
            _Sums(region, exported, prefix, node, grid).write()


def _is_on_grid(bound: Tensor, grid: ExportedQuantizer) -> bool:
    return torch.equal(grid(bound), bound)


@dataclass(frozen=True)
class _Sums:
    """Writes a single minimum or maximum."""

    region: CapturedModule
    exported: list[ExportedQuantizer]
    prefix: str
    node: fx.Node
    """The minimum or maximum of a quantized tensor and a constant."""
    grid: ExportedQuantizer
    """The tensor's quantizer."""

    @property
    def low(self) -> int:
        """The smallest integer of the grid's type."""
        return -128 if self.grid.signed else 0

    @property
    def high(self) -> int:
        """The largest integer of the grid's type."""
        return 127 if self.grid.signed else 255

    def write(self) -> None:
        """Write both sums in place of the node."""
        x: Any = self.node.args[0]
        constant: Any = self.node.args[1]
        integers = torch.round(Op(constant).constant / self.grid.scale) + self.grid.zero_point
        # The end of the type that the first sum saturates at, moved to the bound.
        end = self.high if self.node.target is aten.minimum.default else self.low
        # For a minimum the shift is positive, and x + shift stops at the largest integer; for a maximum it is negative,
        # and the sum stops at the smallest. The second sum takes the shift back.
        shift = end - integers
        moved = self._insert_quantizer(self._add_steps(x, shift, "there"), "moved", self.grid.zero_point)
        result = self._add_steps(moved, -shift, "back")
        reader = quantizer_at(next(iter(self.node.users))) if len(self.node.users) == 1 else None
        if reader is None or not self._has_same_grid(reader):
            result = self._insert_quantizer(result, "bounded", self.grid.zero_point)
        else:
            # The bounds lie on the grid, so that nothing is left to clip.
            reader.quant_min, reader.quant_max = self.low, self.high
        self.node.replace_all_uses_with(result)
        self.region.graph.erase_node(self.node)
        if not constant.users:
            self.region.graph.erase_node(constant)

    def _has_same_grid(self, other: ExportedQuantizer) -> bool:
        same_zero = torch.equal(other.zero_point, self.grid.zero_point)
        return other.signed == self.grid.signed and torch.equal(other.scale, self.grid.scale) and same_zero

    def _add_steps(self, x: fx.Node, shift: Tensor, name: str) -> fx.Node:
        """Add a whole number of steps to each channel, as a constant of the same type with a zero point of its own."""
        # All shifts have one sign: with the zero point at the end that they lead away from, shift + zero is an integer
        # of the type.
        zero = self.low if float(shift.min()) >= 0 else self.high
        buffer = f"{self.node.name}_{name}"
        value = shift * self.grid.scale
        self.region.register_buffer(buffer, value)
        with self.region.graph.inserting_before(self.node):
            constant = self.region.graph.get_attr(buffer)
        record_value(constant, value)
        quantized = self._insert_quantizer(constant, f"{name}_by", torch.tensor(zero).to(self.grid.zero_point))
        with self.region.graph.inserting_before(self.node):
            total = self.region.graph.call_function(aten.add.Tensor, (x, quantized))
        total.meta = dict(self.node.meta)
        return total

    def _insert_quantizer(self, x: fx.Node, name: str, zero_point: Tensor) -> fx.Node:
        """Insert a quantizer of the grid's scale that saturates at the ends of the type."""
        path = f"quantizers.{self.node.name}_{name}"
        twin = twin_of(self.grid, self.prefix + path, self.exported)
        twin.zero_point = zero_point
        twin.repeats = True
        twin.quant_min, twin.quant_max = self.low, self.high
        place(self.region, path, twin)
        with self.region.graph.inserting_before(self.node):
            result = self.region.graph.call_module(path, (x,))
        result.meta = dict(x.meta)
        return result
