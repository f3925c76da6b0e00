"""The exact simulation: a deployed model computed with the target's own integer arithmetic.

Products of integers are summed exactly; the requantization follows the runtime's formulas, in its order of float32
operations. The
formulas of OpenVINO's CPU plugin were found by experiment on each operator and are checked against the runtime by the
tests.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from halfeven.export.integer_layers import IntegerLayer, Products
from halfeven.export.operators import ExportedQuantizer
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind, kind_of, module_of
from halfeven.graph.restoration import CapturedModule
from halfeven.placement.planning import regions


NEARLY_ONE_SHIFT = 5e-5
"""Channels whose shifts differ by less are given the first one's."""


@dataclass(frozen=True, eq=False)
class Ends:
    """A quantizer as OpenVINO keeps it: the ends of a FakeQuantize in float32, and what the plugin makes of them.

    Levels count from 0. A grid whose zero is level 128 of 256 is kept as signed bytes where its readers take them:
    then the rounding happens before 128 is added.
    """

    low: Tensor
    high: Tensor
    steps: int
    signed: bool = False

    @staticmethod
    def of(quantizer: ExportedQuantizer, signed_readers: bool) -> "Ends":
        scale, zero_point = quantizer.scale, quantizer.zero_point.float()
        steps = quantizer.quant_max - quantizer.quant_min
        symmetric = steps == 255 and int(zero_point) - quantizer.quant_min == 128
        low, high = (quantizer.quant_min - zero_point) * scale, (quantizer.quant_max - zero_point) * scale
        return Ends(low, high, steps, symmetric and signed_readers)

    def in_units_of(self, scale: Tensor) -> "Ends":
        return Ends(self.low / scale, self.high / scale, self.steps, self.signed)

    @property
    def scale(self) -> Tensor:
        return (self.high - self.low) / self.steps

    @property
    def zero_level(self) -> Tensor:
        """The level that stands for 0."""
        return torch.round(-self.low / self.scale)

    @property
    def shift(self) -> Tensor:
        """The zero level as float32 arithmetic finds it, sometimes 120.99999 for 121: a fused sum subtracts it so."""
        return (-self.low * torch.full_like(self.low, self.steps)) / (self.high - self.low)

    @property
    def first(self) -> float:
        """The byte that stands for level 0."""
        return -128.0 if self.signed else 0.0

    def levels(self, x: Tensor, fused: bool) -> Tensor:
        """Levels 0 to `steps` of real values: one fused multiply-add, then rounding, then the clip.

        `fused`: the values come from a layer, whose kernel divides by a destination scale where there is no shift.
        """
        # Tensor by tensor: a number divided by a tensor is a reciprocal and a product in PyTorch, which rounds twice.
        steps, one = torch.full_like(self.low, self.steps), torch.ones_like(self.low)
        slope = steps / (self.high - self.low)
        offset = (-self.low * steps) / (self.high - self.low) + self.first
        if fused and self.steps == 255 and not bool(offset):
            slope = one / (one / slope)  # the kernel is given 1 / slope, and multiplies by its reciprocal
        multiplied = (x.double() * slope.double() + offset.double()).float()
        return (torch.round(multiplied) - self.first).clamp(0, self.steps)

    def levels_of_products(self, x: Products) -> Tensor:
        """Levels of a layer without a bias: the runtime divides the ends by the layer's scale, channel by channel."""
        ends = self.in_units_of(x.scale)
        steps = torch.full_like(ends.low, self.steps)
        slope = steps / (ends.high - ends.low)
        if bool((slope == slope.flatten()[0]).all()):
            one = Ends(ends.low.flatten()[0], ends.high.flatten()[0], self.steps, self.signed)
            return one.levels(x.sums, fused=True)
        offset = (-ends.low * steps) / (ends.high - ends.low)
        first = offset.flatten()[0]
        if bool(((offset - first).abs() < NEARLY_ONE_SHIFT).all()):
            offset = first
        offset = offset + self.first
        return (torch.round(x.sums * slope + offset) - self.first).clamp(0, self.steps)


@dataclass(frozen=True)
class Levels:
    """A tensor on a quantizer's grid: unsigned levels, as float32 numbers."""

    values: Tensor
    ends: Ends

    def real(self) -> Tensor:
        return (self.values - self.ends.zero_level) * self.ends.scale


@dataclass(frozen=True)
class Mean:
    """Averages of the bytes of a tensor on a quantizer's grid."""

    values: Tensor
    ends: Ends

    @property
    def zero(self) -> Tensor:
        """The byte that stands for 0."""
        return torch.zeros_like(self.ends.scale) if self.ends.signed else self.ends.shift

    def real(self) -> Tensor:
        return (self.values - self.zero) * self.ends.scale

    def levels(self, ends: Ends) -> Tensor:
        """Levels of another quantizer: the runtime moves its ends to where the bytes are."""
        moved = ends.in_units_of(self.ends.scale)
        return Ends(moved.low + self.zero, moved.high + self.zero, ends.steps, ends.signed).levels(self.values, False)


@dataclass(frozen=True)
class InUnits:
    """Real values divided by a scale: the sum that a convolution and its skip connection are fused into."""

    values: Tensor
    unit: Tensor
    unsigned_skip: bool
    """The skip's bytes have no zero point: only then does the kernel use a destination scale."""

    def real(self) -> Tensor:
        return self.values * self.unit


class ExactModel(nn.Module):
    """A deployed model whose captured regions compute as the target does; called like the model.

    After a call, `levels` holds the integers of every quantizer, by its name. What `given` holds under a quantizer's
    name is handed on in place of what was computed, so that each layer can be compared alone.
    """

    def __init__(self, exported: nn.Module) -> None:
        super().__init__()
        self.levels: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        found = regions(exported)
        if "" in found:
            exported = _ExactRegion(found[""], self.levels, self.given)
        else:
            for name, region in found.items():
                parent, _, attribute = name.rpartition(".")
                setattr(exported.get_submodule(parent), attribute, _ExactRegion(region, self.levels, self.given))
        self.model = exported

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.levels.clear()
        return self.model(*args, **kwargs)


class _ExactRegion(nn.Module):
    def __init__(self, region: CapturedModule, levels: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        super().__init__()
        self.region = region
        self.interpreter = [_Interpreter(region, levels, given)]  # in a list: it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        codegen = self.region.graph._codegen
        flat = self.region.flat_inputs(*args, **kwargs)
        result = self.interpreter[0].run(*flat, enable_io_processing=False)
        return codegen.process_outputs(result)


class _Interpreter(fx.Interpreter):
    def __init__(self, region: CapturedModule, levels: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        super().__init__(region)
        self.found, self.given = levels, given
        self.ends: dict[int, Ends] = {}
        self.layers: dict[fx.Node, IntegerLayer] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        if n.op == "output":
            return pytree.tree_map(_real, args[0], is_leaf=_is_special)
        if n.op == "call_module" and isinstance(quantizer := module_of(n), ExportedQuantizer):
            return self._quantize(n, quantizer, args[0])
        kind = kind_of(n)
        if kind in WEIGHTED and n.op == "call_module" and isinstance(args[0], Levels):
            layer = module_of(n)
            if isinstance(getattr(layer, "weight_quantizer", None), ExportedQuantizer):
                return self._layer(n, layer, args[0])
        if kind in TRANSPARENT and isinstance(args[0], Levels):
            return _same_scale(n, super(), args, kwargs)
        if kind is OperatorKind.CONCAT and all(isinstance(a, Levels) for a in args[0]):
            first = args[0][0].ends
            if all(a.ends is first for a in args[0]):
                rest = (torch.cat([a.values for a in args[0]], *args[1:], **kwargs),)
                return Levels(rest[0], first)
        if kind is OperatorKind.ADD and (fused := _fused_sum(n, args)) is not None:
            return fused
        if kind is OperatorKind.AVERAGE and isinstance(args[0], Levels):
            x = args[0]
            values = (x.values + x.ends.first).double()
            return Mean(getattr(super(), n.op)(n.target, (values, *args[1:]), kwargs).float(), x.ends)
        if kind is OperatorKind.ACTIVATION and isinstance(args[0], Products) and n.target is torch.ops.aten.relu.default:
            return dataclasses.replace(args[0], sums=torch.relu(args[0].sums))
        if kind is OperatorKind.ACTIVATION and isinstance(args[0], InUnits) and n.target is torch.ops.aten.relu.default:
            return dataclasses.replace(args[0], values=torch.relu(args[0].values))
        args, kwargs = pytree.tree_map(_real, (args, kwargs), is_leaf=_is_special)
        return getattr(super(), n.op)(n.target, args, kwargs)

    def _layer(self, node: fx.Node, layer: nn.Module, x: Levels) -> Tensor | Products:
        if node not in self.layers:  # its weight, and the grid of what it reads, are the same for all batches
            self.layers[node] = IntegerLayer.of(layer, x.ends.scale, x.ends.zero_level, x.ends.steps)
        return self.layers[node](x.values)

    def _quantize(self, node: fx.Node, quantizer: ExportedQuantizer, x: Any) -> Any:
        if quantizer.weight:
            return quantizer(x)
        if quantizer.grid not in self.ends:  # one object for a shared grid: concatenation compares by identity
            self.ends[quantizer.grid] = Ends.of(quantizer, signed_readers=not _read_by_convolution(node))
        ends = self.ends[quantizer.grid]
        if quantizer.bounds is not None:
            x = torch.clamp(_real(x), *quantizer.bounds)
        if isinstance(x, Products):
            levels = ends.levels_of_products(x)
        elif isinstance(x, Mean):
            levels = x.levels(ends)
        elif isinstance(x, InUnits):
            levels = ends.in_units_of(x.unit).levels(x.values, fused=x.unsigned_skip)
        else:
            levels = ends.levels(_real(x), fused=_from_layer(node.all_input_nodes[0]))
        self.found[quantizer.name] = levels
        return Levels(self.given.get(quantizer.name, levels), ends)


def _read_by_convolution(node: fx.Node) -> bool:
    """Whether a convolution takes the tensor, directly or through operators that keep the scale: it wants unsigned
    bytes."""
    return any(
        kind_of(user) is OperatorKind.CONVOLUTION
        or (kind_of(user) in (*TRANSPARENT, OperatorKind.CONCAT) and _read_by_convolution(user))
        for user in node.users
    )


def _from_layer(node: fx.Node) -> bool:
    while kind_of(node) is OperatorKind.ACTIVATION:
        node = node.all_input_nodes[0]
    return kind_of(node) in WEIGHTED


def _is_special(value: Any) -> bool:
    return isinstance(value, Levels | InUnits | Products | Mean)


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, Levels | InUnits | Products | Mean) else value


def _same_scale(node: fx.Node, run: Any, args: Any, kwargs: Any) -> Any:
    x: Levels = args[0]
    result = getattr(run, node.op)(node.target, (x.values, *args[1:]), kwargs)
    return pytree.tree_map(lambda values: Levels(values, x.ends), result)


def _fused_sum(node: fx.Node, args: Any) -> InUnits | None:
    """A convolution added to a quantized skip connection: the plugin adds in units of the skip's scale."""
    if len(args) < 2 or node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return None
    for branch, skip, source in ((args[0], args[1], node.args[0]), (args[1], args[0], node.args[1])):
        if not (isinstance(branch, Tensor | Products) and isinstance(skip, Levels) and isinstance(source, fx.Node)):
            continue
        if kind_of(source) is OperatorKind.CONVOLUTION and _real(branch).shape == skip.values.shape:
            unit = skip.ends.scale
            zero = torch.zeros_like(unit) if skip.ends.signed else skip.ends.shift
            if isinstance(branch, Products):
                scaled = (branch.sums - (zero * unit) / branch.scale) * (branch.scale / unit)
            else:
                scaled = (branch - zero * unit) * (torch.ones_like(unit) / unit)
            unsigned = not skip.ends.signed and not bool(skip.ends.zero_level)
            return InUnits(scaled + (skip.values + skip.ends.first), unit, unsigned)
    return None
