"""ONNX's own definitions of its operators, computed in float: the reference that runtimes for ONNX files share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import module_of
from halfeven.runtimes.simulation import Simulated, Simulation


@dataclass(frozen=True, eq=False)
class Grid:
    """The integers of a quantizer, as QuantizeLinear and DequantizeLinear define them."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    first: int
    """Smallest integer of its type."""

    @staticmethod
    def of(quantizer: ExportedQuantizer) -> "Grid":
        first = -128 if quantizer.signed else 0
        return Grid(quantizer.scale, quantizer.zero_point.float(), quantizer.quant_min, quantizer.quant_max, first)

    def clipped(self, integers: Tensor) -> Tensor:
        return integers.clamp(self.low, self.high)

    def quantized(self, x: Tensor) -> Tensor:
        """Return integers as QuantizeLinear defines them: a division, then rounding, then the zero point."""
        return self.clipped(torch.round(x / self.scale) + self.zero_point)


@dataclass(frozen=True, eq=False)
class Integers(Simulated):
    """A tensor on a quantizer's grid."""

    values: Tensor
    grid: Grid

    @property
    def codes(self) -> Tensor:
        return self.values - self.grid.first

    def real(self) -> Tensor:
        return (self.values - self.grid.zero_point) * self.grid.scale

    def integers(self, grid: Grid) -> Tensor:
        # Requantizing to the same grid is exact: (q - z) s / s may round, the integers themselves do not.
        if torch.equal(grid.scale, self.grid.scale) and torch.equal(grid.zero_point, self.grid.zero_point):
            return grid.clipped(self.values)
        return grid.quantized(self.real())


class LiteralInterpreter(fx.Interpreter):
    """Computes a region as ONNX defines its operators, in float: what a runtime without stated arithmetic is near."""

    def __init__(self, region: CapturedModule, simulation: Simulation) -> None:
        super().__init__(region)
        self.simulation = simulation

    def run_node(self, n: fx.Node) -> Any:
        result = self._computed(n)
        return pytree.tree_map(_rounded_to_half, result) if self.simulation.half else result

    def _computed(self, n: fx.Node) -> Any:
        if n.op != "call_module" or not isinstance(quantizer := module_of(n), ExportedQuantizer) or quantizer.weight:
            return super().run_node(n)
        (x,), _ = self.fetch_args_kwargs_from_env(n)
        grid = Grid.of(quantizer)
        integers = grid.quantized(x)
        return Integers(self.simulation.keep(quantizer.name, integers - grid.first) + grid.first, grid).real()


def _rounded_to_half(value: Any) -> Any:
    """Return a tensor of floats rounded to float16, in float32: kernels compute in more bits and round their result."""
    return value.half().float() if isinstance(value, Tensor) and value.dtype is torch.float32 else value
