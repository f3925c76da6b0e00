"""ONNX Runtime's integer arithmetic on x86 CPUs, operator by operator.

The formulas of its kernels (MLAS, QLinear operators) were found by experiment on each operator and are checked against
the runtime by the tests. A number that a quantizer reads is requantized where the kernel ends in one, and quantized by
QuantizeLinear where it computes in float. Operators that it computes in float it computes here, too
(`float_operators`).
"""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.deployed import Int32Bias
from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.runtimes.float32 import fused_multiply_add
from halfeven.runtimes.float_operators import FloatOperators, needs_runtime_kernel
from halfeven.runtimes.integer_layers import IntegerLayer
from halfeven.runtimes.onnx.literal import Grid, Integers
from halfeven.runtimes.onnxruntime.gates import LARGEST_CODE, needs_no_clip, operand_scales
from halfeven.runtimes.onnxruntime.session import function_of, softmax_of_integers
from halfeven.runtimes.simulation import Simulated, Simulation, is_simulated, real_values

aten = torch.ops.aten
K = OperatorKind


def _requantized(grid: Grid, sums: Tensor, unit: Tensor) -> Tensor:
    """Return the integers that a kernel ends with, of float32 sums in units of a scale: a product, then rounding, then
    the zero point."""
    # QLinearConv and QGemm: (s_x s_w) / s_o is computed first, as one float32 number; another order gives other bits.
    return grid.clipped(torch.round(sums * (unit / grid.scale)) + grid.zero_point)


@dataclass(frozen=True, eq=False)
class Sums(Simulated):
    """Exact sums of integer products, rounded to float32, and the scale that they are in units of."""

    values: Tensor
    unit: Tensor

    def real(self) -> Tensor:
        return self.values * self.unit

    def integers(self, grid: Grid) -> Tensor:
        return _requantized(grid, self.values, self.unit)


@dataclass(frozen=True, eq=False)
class Combined(Simulated):
    """Two tensors of integers added or multiplied: QLinearAdd, QLinearMul add the zero point before they round."""

    a: Integers
    b: Integers
    kind: OperatorKind
    sign: float = 1.0

    def real(self) -> Tensor:
        if self.kind is K.MULTIPLY:
            return self.a.real() * self.b.real()
        return self.a.real() + self.sign * self.b.real()

    def integers(self, grid: Grid) -> Tensor:
        if self.sign != 1.0:
            return grid.quantized(self.real())  # there is no QLinearSub
        a = self.a.grid
        b = self.b.grid
        if self.kind is K.MULTIPLY:
            # QLinearMul: round((q_a - z_a)(q_b - z_b) * (s_a s_b / s) + z), of which the integer product is exact.
            product = (self.a.values - a.zero_point) * (self.b.values - b.zero_point)
            return grid.clipped(
                torch.round(fused_multiply_add(product, a.scale * b.scale / grid.scale, grid.zero_point))
            )
        # QLinearAdd: with k = s_operand / s, round(q_a k_a + (q_b k_b + (z - (k_a z_a + k_b z_b)))), by fused
        # multiply-adds.
        k_a = a.scale / grid.scale
        k_b = b.scale / grid.scale
        fixed = grid.zero_point - fused_multiply_add(k_a, a.zero_point, k_b * b.zero_point)
        return grid.clipped(
            torch.round(fused_multiply_add(self.a.values, k_a, fused_multiply_add(self.b.values, k_b, fixed)))
        )


@dataclass(frozen=True, eq=False)
class Mean(Simulated):
    """The mean of a tensor of integers over all positions."""

    sums: Tensor
    count: int
    grid: Grid

    def real(self) -> Tensor:
        return self.sums / self.count * self.grid.scale

    def integers(self, grid: Grid) -> Tensor:
        # QLinearGlobalAveragePool: both scales and the count are one factor, and the zero point is added after
        # rounding.
        factor = self.grid.scale / (grid.scale * self.count)
        return grid.clipped(torch.round(self.sums * factor) + grid.zero_point)


@dataclass(frozen=True, eq=False)
class Pooled(Simulated):
    """Averages over windows of a tensor of integers: QLinearAveragePool adds the zero point before it rounds."""

    values: Tensor

    def real(self) -> Tensor:
        return self.values

    def integers(self, grid: Grid) -> Tensor:
        return grid.clipped(torch.round(self.values / grid.scale + grid.zero_point))


@dataclass(frozen=True, eq=False)
class Added(Simulated):
    """A sum in float, which becomes one kernel with the normalization that reads it."""

    a: Tensor
    b: Tensor

    def real(self) -> Tensor:
        return self.a + self.b

    def integers(self, grid: Grid) -> Tensor:
        return grid.quantized(self.real())


def _normalized_alone(node: fx.Node) -> bool:
    """Return True if a normalization, and nothing else, reads a sum of two tensors."""
    if node.target is not aten.add.Tensor or len(node.all_input_nodes) != 2:
        return False
    return [kind_of(user) for user in node.users] == [K.NORMALIZATION]


class ONNXRuntimeInterpreter(fx.Interpreter):
    """Computes a region as the runtime does; the integers of each quantizer go to `simulation`."""

    def __init__(self, region: CapturedModule, simulation: Simulation) -> None:
        super().__init__(region)
        self.simulation = simulation
        self.layers: dict[fx.Node, IntegerLayer] = {}
        self.float_operators = FloatOperators(function_of, constants_are_inputs=True)

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        if n.op == "output":
            return pytree.tree_map(real_values, args[0], is_leaf=is_simulated)
        if n.op == "call_module" and isinstance(quantizer := module_of(n), ExportedQuantizer):
            return self._run_quantizer(quantizer, args[0])
        # On integers where the runtime has a kernel; else by its own float kernel, where the last bits depend on that;
        # else as torch computes.
        found = self._computed_on_integers(n, args, kwargs)
        if found is not None:
            return found
        if needs_runtime_kernel(n):
            return self._computed_by_runtime(n)
        args, kwargs = pytree.tree_map(real_values, (args, kwargs), is_leaf=is_simulated)
        if _normalized_alone(n) and not kwargs and all(isinstance(a, Tensor) for a in args):
            return Added(*args)
        return getattr(super(), n.op)(n.target, args, kwargs)

    def _computed_by_runtime(self, n: fx.Node) -> Any:
        source = n.all_input_nodes[0]
        nodes = [n]
        values = {operand: real_values(self.env[operand]) for operand in n.all_input_nodes if operand is not source}
        # The runtime makes one kernel of the sum and the normalization, so both are in one file here.
        if isinstance(read := self.env[source], Added):
            nodes = [source, n]
            values |= zip(source.all_input_nodes, (read.a, read.b), strict=True)
            return self.float_operators.compute(nodes, values)
        values[source] = real_values(read)
        return self.float_operators.compute_results(n, values)

    def _computed_on_integers(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return the result of an operator on integers, where it has an integer kernel; else None."""
        kind = kind_of(n)
        # Averages: QLinearGlobalAveragePool and QLinearAveragePool.
        if n.target is torch.ops.halfeven.global_average_pool.default and isinstance(args[0], Integers):
            return _mean_of_channels(args[0])
        if _is_average_pool(n) and isinstance(args[0], Integers):
            return Pooled(getattr(super(), n.op)(n.target, (args[0].real(), *args[1:]), kwargs))
        # Operators that keep the scale, and concatenations on one grid, move integers.
        if n.target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        if kind in TRANSPARENT and isinstance(args[0], Integers):
            values = getattr(super(), n.op)(n.target, (args[0].values, *args[1:]), kwargs)
            return pytree.tree_map(lambda one: Integers(one, args[0].grid), values)
        if kind is K.CONCAT and _share_one_grid(args[0]):
            return Integers(torch.cat([a.values for a in args[0]], *args[1:], **kwargs), args[0][0].grid)
        # Layers: QLinearConv, QGemm, or a product of integers with an addition behind it.
        if kind in WEIGHTED and n.op == "call_module" and isinstance(args[0], Integers):
            layer = module_of(n)
            if isinstance(getattr(layer, "weight_quantizer", None), ExportedQuantizer):
                return self._run_layer(n, layer, args[0])
        # The file has an addition in the place of a hard sigmoid (`gates`).
        if (
            n.target is aten.hardsigmoid.default
            and isinstance(args[0], Integers)
            and _grid_clips(_grid_of_only_reader(n))
        ):
            return _hard_sigmoid(args[0])
        # Two tensors: QLinearAdd, QLinearMul and products of activations, whose sums are exact in float64.
        if kind in (K.ADD, K.MULTIPLY) and len(args) == 2 and all(isinstance(a, Integers) for a in args):
            sign = -1.0 if Op(n).row.subtracts else 1.0
            return Combined(args[0], args[1], kind, sign) if not kwargs else None
        if kind is K.MATMUL and all(isinstance(a, Integers) for a in args[:2]):
            a, b = (x.values - x.grid.zero_point for x in args[:2])
            product = getattr(super(), n.op)(n.target, (a.double(), b.double()), kwargs)
            return Sums(product.float(), args[0].grid.scale * args[1].grid.scale)
        # Between two quantizers, a softmax is one kernel with both.
        if kind is K.SOFTMAX and isinstance(args[0], Integers) and (grid := _grid_of_only_reader(n)) is not None:
            return Integers(grid.clipped(softmax_of_integers(args[0].values, args[1], args[0].grid, grid)), grid)
        return None

    def _run_layer(self, node: fx.Node, layer: Any, x: Integers) -> Tensor | Sums:
        if node not in self.layers:
            zero_code = x.grid.zero_point - x.grid.first
            # Codes are bytes, whatever the bits of the grid.
            self.layers[node] = IntegerLayer.of(layer, x.grid.scale, zero_code, 255)
        made = self.layers[node]
        sums = made.sums(x.codes)
        if layer.bias is None:
            return Sums(sums.float(), made.scale)
        if isinstance(layer, nn.Linear) and sums.ndim != 2:  # a product, and an addition in float
            bias: Tensor = layer.bias
            return Sums(sums.float(), made.scale).real() + bias
        after = 0 if isinstance(layer, nn.Linear) else sums.ndim - 2
        scale = x.grid.scale * layer.weight_quantizer.scale
        # The accumulator starts at the 32-bit bias: the sum of both is exact, and is rounded to float32 once.
        integers = Int32Bias.of(layer.bias, scale).integers.reshape(-1, *[1] * after)
        return Sums((sums.double() + integers).float(), made.scale)

    def _run_quantizer(self, quantizer: ExportedQuantizer, x: Any) -> Any:
        if quantizer.weight:
            return quantizer(x)
        grid = Grid.of(quantizer)
        integers = x.integers(grid) if is_simulated(x) else grid.quantized(x)
        return Integers(self.simulation.keep(quantizer.name, integers - grid.first) + grid.first, grid)


def _grid_clips(grid: Grid | None) -> bool:
    return grid is not None and grid.first == 0 and needs_no_clip(grid.scale, grid.zero_point, grid.low, grid.high)


def _hard_sigmoid(x: Integers) -> Combined:
    """Return the sum that the file has in the place of a hard sigmoid between two quantizers."""
    finer, half = operand_scales(x.grid.scale.numpy()[()])
    sixth = Integers(x.values, replace(x.grid, scale=torch.tensor(finer)))
    constant = Grid(torch.tensor(half, dtype=torch.float32), torch.tensor(0.0), 0, LARGEST_CODE, 0)
    return Combined(sixth, Integers(torch.tensor(float(LARGEST_CODE)), constant), K.ADD)


def _is_average_pool(node: fx.Node) -> bool:
    """Return True for an average over windows whose size the call gives."""
    row = Op(node).row
    return row.kind is K.AVERAGE and row.window > 0 and not row.adaptive


def _share_one_grid(tensors: Any) -> bool:
    if not all(isinstance(one, Integers) for one in tensors):
        return False
    return len({(float(one.grid.scale), float(one.grid.zero_point)) for one in tensors}) == 1


def _grid_of_only_reader(node: fx.Node) -> Grid | None:
    """Return the grid of the quantizer that alone reads a tensor, or None."""
    readers = [module_of(user) if user.op == "call_module" else None for user in node.users]
    if len(readers) != 1 or not isinstance(quantizer := readers[0], ExportedQuantizer):
        return None
    return Grid.of(quantizer)


def _mean_of_channels(x: Integers) -> Mean:
    axes = tuple(range(2, x.values.ndim))
    count = x.values[0, 0].numel()
    return Mean((x.values - x.grid.zero_point).double().sum(axes, keepdim=True).float(), count, x.grid)
