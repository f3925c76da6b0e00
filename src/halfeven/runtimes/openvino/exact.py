"""OpenVINO's integer arithmetic, operator by operator.

The formulas of its CPU plugin were found by experiment on each operator and are checked against the runtime by the
tests. Operators that the plugin computes in float are computed by the plugin itself (`float_operators`).
"""

import dataclasses
import operator
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.deployment.grids import quantizer_at
from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.runtimes.float_operators import FloatOperators, needs_runtime_kernel
from halfeven.runtimes.openvino.arithmetic_of_numbers import is_number, plus_number, times_number
from halfeven.runtimes.openvino.attention import is_in_attention
from halfeven.runtimes.openvino.clips import Clipped, clipped, read_by_quantizer
from halfeven.runtimes.openvino.exact_values import (
    Accumulator,
    Average,
    Codes,
    FakeQuantizeRange,
    Scaled,
    ScaledSum,
    Shifted,
)
from halfeven.runtimes.openvino.kernels_between import KernelsBetween
from halfeven.runtimes.openvino.layer_norm import is_layer_norm, layer_norm_input
from halfeven.runtimes.openvino.layers import OpenVINOLayer
from halfeven.runtimes.openvino.residual_add import fused_sum, is_unrounded, sum_in_kernel, sum_of_integers
from halfeven.runtimes.openvino.session import function_of
from halfeven.runtimes.openvino.sums_in_kernels import Branch
from halfeven.runtimes.simulation import Simulation, is_simulated, real_values
from halfeven.targets.openvino import OPENVINO, is_integer_pool

NEAR_A_TIE = 2.0**-12
"""Distance, in steps, from the middle between two integers below which the order of float32 operations can matter."""

KERNEL_ERROR = 2.0**-10
"""Steps by which the plugin's kernels may differ from the formulas before they round."""

PART_OF_THE_FILE = 0.999
"""Share of integers that a part of the file must have in common with the formulas to be asked at all."""

SCALINGS = (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)


class OpenVINOInterpreter(fx.Interpreter):
    """Computes a region as the plugin does; the integers of each quantizer go to `simulation`."""

    def __init__(self, region: CapturedModule, simulation: Simulation) -> None:
        super().__init__(region)
        self.simulation = simulation
        self.limits: dict[int, FakeQuantizeRange] = {}
        self.layers: dict[fx.Node, OpenVINOLayer] = {}
        self.float_operators = FloatOperators(function_of)
        self.kernels = KernelsBetween(region, simulation)
        self.inputs: tuple[Any, ...] = ()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.inputs = args
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        if n.op == "output":
            return pytree.tree_map(real_values, args[0], is_leaf=is_simulated)
        if n.op == "call_module" and isinstance(quantizer := module_of(n), ExportedQuantizer):
            return self._run_quantizer(n, quantizer, args[0])
        # A rule for the operator itself comes before the rule for its kind.
        rule = RULES.get(n.target, RULES.get(kind_of(n)))
        made = None if rule is None else rule(self, n, args, kwargs)
        return self._run_in_float(n, args, kwargs) if made is None else made

    def _run_on(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator itself on other values."""
        return getattr(super(), node.op)(node.target, args, kwargs)

    def _run_in_float(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if needs_runtime_kernel(node):
            values = {operand: real_values(self.env[operand]) for operand in node.all_input_nodes}
            if is_layer_norm(node):
                values[node.all_input_nodes[0]] = layer_norm_input(args[0])
            return self.float_operators.compute_results(node, values)
        return self._run_on(node, *pytree.tree_map(real_values, (args, kwargs), is_leaf=is_simulated))

    def _run_layer(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor | Accumulator | Shifted | None:
        layer = module_of(node) if node.op == "call_module" else None
        x = args[0]
        if not isinstance(x, Codes) or not isinstance(getattr(layer, "weight_quantizer", None), ExportedQuantizer):
            return None
        if node not in self.layers:  # its weight, and the grid of what it reads, are the same for all batches
            self.layers[node] = OpenVINOLayer.of(layer, x.limits)
        result = self.layers[node](x.values)
        # Only a quantizer takes in the bias that all outputs have in common.
        read_by_quantizers = all(quantizer_at(reader) is not None for reader in node.users)
        return result.real() if isinstance(result, Shifted) and not read_by_quantizers else result

    def _keep_grid(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if node.target is operator.getitem and isinstance(x, tuple | list):
            return x[args[1]]
        if not isinstance(x, Codes):
            return None
        result = self._run_on(node, (x.values, *args[1:]), kwargs)
        return pytree.tree_map(lambda values: Codes(values, x.limits), result)

    def _concatenate(self, node: fx.Node, args: Any, kwargs: Any) -> Codes | None:
        if not all(isinstance(x, Codes) and x.limits is args[0][0].limits for x in args[0]):
            return None
        return Codes(torch.cat([x.values for x in args[0]], *args[1:], **kwargs), args[0][0].limits)

    def _multiply_tensors(self, node: fx.Node, args: Any, kwargs: Any) -> Accumulator | None:
        if not all(isinstance(x, Codes) for x in args[:2]):
            return None
        # Products of codes are exact in float64, and the sum is rounded to float32 once.
        sums = self._run_on(node, tuple(x.values.double() - x.limits.zero_code for x in args[:2]), {})
        first, second = (x.limits.scale for x in args[:2])
        return Accumulator(sums.float(), first * second, (first, second))

    def _negate(self, node: fx.Node, args: Any, kwargs: Any) -> Scaled | Average | None:
        """Multiply integers, or an average of them, by -1."""
        (x,) = args
        return times_number(x, torch.tensor(-1.0), lambda: -real_values(x))

    def _scale_by_number(self, node: fx.Node, args: Any, kwargs: Any) -> Accumulator | Scaled | Average | None:
        """Multiply or divide by a number: the scale of integers takes it in.

        Of products of activations the plugin moves it to the second factor, unless something else reads the products.
        """
        x, number = args
        product = node.all_input_nodes[0]
        if not is_number(number) or number == 0:
            return None
        factor = torch.tensor(float(number))
        factor = 1 / factor if node.target is torch.ops.aten.div.Tensor else factor
        if not isinstance(x, Accumulator):
            return times_number(x, factor, lambda: self._run_on(node, (real_values(x), number), kwargs))
        if x.scales is None or kind_of(product) is not OperatorKind.MATMUL or len(product.users) != 1:
            return None
        return Accumulator(x.values, x.scales[0] * (x.scales[1] * factor))

    def _add_number(self, node: fx.Node, args: Any, kwargs: Any) -> Scaled | Average | None:
        """Add a number to integers or to an average of them, or subtract them from it."""
        if kwargs or len(args) != 2:
            return None
        return plus_number(node, args, lambda: self._run_on(node, tuple(map(real_values, args)), {}))

    def _add_tensors(self, node: fx.Node, args: Any, kwargs: Any) -> ScaledSum | Scaled | Average | None:
        """Return a sum that the plugin takes in units of an operand's scale."""
        if any(map(is_number, args)):
            return self._add_number(node, args, kwargs)
        if len(args) < 2 or node.target is not torch.ops.aten.add.Tensor or kwargs:
            return None
        # In this order: a branch that is marked, a layer's result and integers, integers that the plugin does not
        # round, two tensors of integers.
        for branch, skip in (args, args[::-1]):
            if isinstance(branch, Branch) and isinstance(skip, Codes):
                return branch.plus(skip)
        if not all(isinstance(x, Codes) for x in args):
            return fused_sum(node, args)
        if (in_kernel := sum_in_kernel(args)) is not None:
            self.simulation.watching_matters = True
            if not self.simulation.watched:
                return in_kernel
        return sum_of_integers(node, args)

    def _unmark_branch(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return the operand of a sum that is marked; an ONNX file has no marks."""
        file = self.simulation.file
        return Branch(*args) if file is None or file.suffix == ".xml" else args[0]

    def _average_codes(self, node: fx.Node, args: Any, kwargs: Any) -> Average | None:
        if not isinstance(args[0], Codes) or _adaptive_in_float(node):
            return None
        # Of integers: float64 rounds once, as their quotient does.
        values = self._run_on(node, (args[0].bytes.double(), *args[1:]), kwargs).float()
        rounded = torch.round(values) if OPENVINO.rounds_average(node) else values
        return Average(rounded, args[0].limits, is_integer_pool(node))

    def _activate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Apply a leaky ReLU or a clip in the units of a sum, a layer's result, integers or an average."""
        bounds = Op(node).bounds
        x = args[0]
        if bounds is None:
            # A unit is positive, so a leaky ReLU commutes with it.
            if Op(node).row.homogeneous and isinstance(x, ScaledSum):
                return x.changed(lambda values: self._run_on(node, (values, *args[1:]), kwargs))
            return None
        if _counts_in_bytes(x):
            return clipped(x, node, bounds)
        if not isinstance(x, ScaledSum | Accumulator):
            return None
        # No clip is left of it where the quantizer that reads it clips as much or more.
        if (quantizer := _joined_quantizer(node)) is not None:
            limits = self._limits_of(next(iter(node.users)), quantizer)
            if bounds[0] <= float(limits.low) and float(limits.high) <= bounds[1]:
                return x
        return _clip_in_units(x, bounds)

    def _run_quantizer(self, node: fx.Node, quantizer: ExportedQuantizer, x: Any) -> Any:
        if quantizer.weight:
            return quantizer(x)
        limits = self._limits_of(node, quantizer)
        # The clamp of a grid narrower than 8 bits stands before its quantizer in the file.
        if _counts_in_bytes(x):
            x = read_by_quantizer(x, limits, quantizer.bounds)
        elif quantizer.bounds is not None:
            x = _clip_in_units(x, quantizer.bounds)
        # Where the kernel of a convolution takes in the sum behind, the file as users run it does not round.
        unrounded = None
        if quantizer.bounds is None and is_unrounded(node, (float(limits.low), float(limits.high))):
            unrounded = real_values(x).clamp(limits.low, limits.high)
        # Signed bytes are rounded before 128 is added in a layer's kernel, and after it elsewhere.
        kernel = limits.in_kernel() if _is_in_kernel(node) else limits
        codes = self._codes_from(node, kernel, x)
        if _is_computed_between(node, x, self.layers):
            codes = self._rounded_by_kernel(quantizer.name, kernel, real_values(x), codes)
        # What is read of the file are real values, and integers by the quantizer's own zero point.
        kept = self.simulation.keep(quantizer.name, codes + limits.lost) - limits.lost
        result = Codes(kept, limits, unrounded)
        self.simulation.tensors[quantizer.name] = result
        return result

    def _rounded_by_kernel(self, name: str, limits: FakeQuantizeRange, x: Tensor, codes: Tensor) -> Tensor:
        """Return codes whose values near the middle between two integers are rounded by the plugin's own kernel."""
        # The place of each value on the grid, in float64. Only near the middle of two integers can the kernel's order
        # of operations decide.
        exact = (x.double() * limits.slope.double() + limits.shift.double()).clamp(0, limits.steps)
        if bool(((exact - exact.round()).abs() < 0.5 - NEAR_A_TIE).all()):
            return codes
        self.simulation.watching_matters = True
        found = self.kernels.compute(name, self.inputs)
        if found is None:
            return codes
        # The kernel decides between the two integers next to a middle. An integer further away is no rounding, so the
        # formula's stays. Where there are many, the plugin computes the part alone otherwise than within the file (a
        # product of parts of a split, say), and decides nothing.
        theirs = torch.round(found / limits.scale).reshape(codes.shape) + limits.zero_code
        rounded = (theirs - exact).abs() <= 0.5 + KERNEL_ERROR
        return torch.where(rounded, theirs, codes) if rounded.float().mean() > PART_OF_THE_FILE else codes

    def _codes_from(self, quantizer: fx.Node, limits: FakeQuantizeRange, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return limits.codes(x, from_layer=kind_of(_before_activations(quantizer)) in WEIGHTED)
        watched: Tensor = x.codes(limits)
        # An attention is a single operator, unless its tensors are watched.
        if isinstance(x, Accumulator) and is_in_attention(quantizer):
            return self.simulation.choose(watched, limits.moved(x.unit).codes_in_attention(x.values))
        # The destination scale of the layer's kernel applies to its sum too, unless a tensor between is watched.
        if isinstance(x, ScaledSum) and x.in_kernel is not None:
            return self._codes_of_branch(quantizer, watched, limits.moved(x.unit).codes(x.in_kernel, from_layer=True))
        if isinstance(x, ScaledSum) and x.from_layer:
            return self.simulation.choose(watched, limits.moved(x.unit).codes(x.values, from_layer=True))
        return watched

    def _codes_of_branch(self, quantizer: fx.Node, alone: Tensor, in_kernel: Tensor) -> Tensor:
        """Return the integers behind a marked sum: of an operator of its own, or in the convolution's kernel.

        What decides is how the plugin uses memory: a skip connection that is an output, or a part of another tensor,
        keeps the sum out of the kernel, unless the convolution reads a copy of it.
        """
        if torch.equal(alone, in_kernel):
            return alone
        self.simulation.watching_matters = True
        fused = self.kernels.is_in_convolution(str(module_of(quantizer).name), self.inputs)
        return in_kernel if fused else alone

    def _limits_of(self, node: fx.Node, quantizer: ExportedQuantizer) -> FakeQuantizeRange:
        if quantizer.grid_number not in self.limits:  # one object for a shared grid: concatenation compares by identity
            self.limits[quantizer.grid_number] = FakeQuantizeRange.of(
                quantizer, signed_readers=not _read_by_convolution(node)
            )
        return self.limits[quantizer.grid_number]


RULES: dict[Any, Callable[[OpenVINOInterpreter, fx.Node, Any, Any], Any]] = {
    **dict.fromkeys(WEIGHTED, OpenVINOInterpreter._run_layer),
    **dict.fromkeys(TRANSPARENT, OpenVINOInterpreter._keep_grid),
    OperatorKind.CONCAT: OpenVINOInterpreter._concatenate,
    OperatorKind.MATMUL: OpenVINOInterpreter._multiply_tensors,
    OperatorKind.ADD: OpenVINOInterpreter._add_tensors,
    **dict.fromkeys(SCALINGS, OpenVINOInterpreter._scale_by_number),
    torch.ops.aten.neg.default: OpenVINOInterpreter._negate,
    torch.ops.aten.rsub.Scalar: OpenVINOInterpreter._add_number,
    OperatorKind.AVERAGE: OpenVINOInterpreter._average_codes,
    OperatorKind.ACTIVATION: OpenVINOInterpreter._activate,
    torch.ops.halfeven.branch_of_sum.default: OpenVINOInterpreter._unmark_branch,
}
"""Operator or kind -> the rule that computes it on integers; a rule returns None where the plugin computes in float."""


def _is_computed_between(quantizer: fx.Node, x: Any, layers: Container[fx.Node]) -> bool:
    """Return True if the plugin fuses the operators before a quantizer into a kernel whose arithmetic varies.

    The formulas of a layer's own kernel (with its activation function, with a sum that it computes) and of integers are
    known. What such a kernel rounds depends on the readers of its bytes, which a part of the file does not have.

    Args:
        quantizer: what ends the kernel.
        x: what it reads.
        layers: the layers that read integers.
    """
    if isinstance(x, Tensor):
        before = _before_activations(quantizer)
        return kind_of(before) is not OperatorKind.INPUT and (before not in layers or _is_scaled_apart(before))
    if isinstance(x, ScaledSum):
        return not x.from_layer
    if isinstance(x, Scaled):
        return x.is_sum
    if isinstance(x, Average):
        return kind_of(quantizer.all_input_nodes[0]) is OperatorKind.ACTIVATION
    return isinstance(x, Accumulator) and x.scales is not None and not is_in_attention(quantizer)


def _counts_in_bytes(x: Any) -> bool:
    """Return True for integers, also times a number or behind clips, and for averages over windows of integers."""
    return isinstance(x, Codes | Scaled | Clipped) or (isinstance(x, Average) and x.of_window)


def _joined_quantizer(clip: fx.Node) -> ExportedQuantizer | None:
    """Return the quantizer that alone reads a clip, if it has no clip of its own between them; else None."""
    quantizer = quantizer_at(next(iter(clip.users))) if len(clip.users) == 1 else None
    return None if quantizer is None or quantizer.bounds is not None else quantizer


def _clip_in_units(x: Any, bounds: tuple[float, float]) -> Any:
    """Clip values in their own units, where all channels have the same unit or the bounds are the same in all units."""
    if not isinstance(x, ScaledSum | Accumulator):
        return real_values(x).clamp(*bounds)
    # A unit is positive: the clip at a bound is the clip of the values at the bound over the unit. Bounds of 0 and
    # infinity are the same in all units.
    if x.unit.numel() == 1:
        low, high = (bound / float(x.unit) for bound in bounds)
    elif all(bound in (0.0, float("-inf"), float("inf")) for bound in bounds):
        low, high = bounds
    else:
        return x.real().clamp(*bounds)
    if isinstance(x, ScaledSum):
        return x.changed(lambda values: values.clamp(low, high))
    return dataclasses.replace(x, values=x.values.clamp(low, high))


def _read_by_convolution(node: fx.Node) -> bool:
    """Return True if a convolution reads the tensor, directly or through operators that keep the scale.

    Convolutions want unsigned bytes.
    """
    return any(
        kind_of(user) is OperatorKind.CONVOLUTION
        or (kind_of(user) in (*TRANSPARENT, OperatorKind.CONCAT) and _read_by_convolution(user))
        for user in node.users
    )


def _adaptive_in_float(node: fx.Node) -> bool:
    """Return True for an adaptive pool to more than one place: the plugin has no integer kernel for it."""
    if not Op(node).row.adaptive:
        return False
    sizes = node.args[1]
    return any(size != 1 for size in (sizes if isinstance(sizes, list | tuple) else [sizes]))


def _before_activations(quantizer: fx.Node) -> fx.Node:
    """Return the operator that a quantizer reads, before the activation functions between."""
    node = quantizer.all_input_nodes[0]
    while kind_of(node) is OperatorKind.ACTIVATION:
        node = node.all_input_nodes[0]
    return node


def _is_in_kernel(quantizer: fx.Node) -> bool:
    """Return True if a quantizer is a part of the kernel of a layer, a product or a pool.

    Elsewhere it is an operator of its own, or a part of a group of elementwise operators, as a layer's sum with a skip
    connection is.
    """
    before = _before_activations(quantizer)
    return kind_of(before) in (*WEIGHTED, OperatorKind.MATMUL, OperatorKind.AVERAGE) and not _is_scaled_apart(before)


def _is_scaled_apart(node: fx.Node) -> bool:
    """Return True for a linear layer on more than three axes: an operator of its own scales and quantizes its sums."""
    return kind_of(node) is OperatorKind.LINEAR and Op(node).ndim > 3
