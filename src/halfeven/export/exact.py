"""The exact simulation: a deployed model computed with the target's own integer arithmetic.

Products of integers are summed exactly; the requantization follows the runtime's formulas, in its order of float32 operations. The
formulas of OpenVINO's CPU plugin were found by experiment on each operator and are checked against the runtime by the tests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from halfeven.arithmetic import per_channel
from halfeven.export.operators import ExportedQuantizer
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind, kind_of, module_of
from halfeven.graph.restoration import CapturedModule
from halfeven.placement.layers import operation
from halfeven.placement.planning import regions

EXACT_IN_FLOAT32 = 2.0**24
"""Integer sums below this are exact in float32; layers that could exceed it are summed in float64."""


@dataclass(frozen=True)
class Ends:
    """A quantizer as OpenVINO keeps it: the ends of a FakeQuantize in float32, and what the plugin makes of them."""

    low: Tensor
    high: Tensor
    steps: int

    @staticmethod
    def of(quantizer: ExportedQuantizer) -> "Ends":
        scale, zero_point = quantizer.scale, quantizer.zero_point.float()
        return Ends(
            (quantizer.quant_min - zero_point) * scale,
            (quantizer.quant_max - zero_point) * scale,
            quantizer.quant_max - quantizer.quant_min,
        )

    def in_units_of(self, scale: Tensor) -> "Ends":
        return Ends(self.low / scale, self.high / scale, self.steps)

    @property
    def scale(self) -> Tensor:
        return (self.high - self.low) / self.steps

    @property
    def zero_level(self) -> Tensor:
        """The level that stands for 0."""
        return torch.round(-self.low / self.scale)

    def levels(self, x: Tensor) -> Tensor:
        """Levels 0 to `steps` of real values: one fused multiply-add, then rounding, then the clip."""
        slope = self.steps / (self.high - self.low)
        offset = (-self.low * self.steps) / (self.high - self.low)
        fused = (x.double() * slope.double() + offset.double()).float()
        return torch.round(fused).clamp(0, self.steps)


@dataclass(frozen=True)
class Levels:
    """A tensor on a quantizer's grid: unsigned levels, as float32 numbers."""

    values: Tensor
    ends: Ends

    def real(self) -> Tensor:
        return (self.values - self.ends.zero_level) * self.ends.scale


@dataclass(frozen=True)
class InUnits:
    """Real values divided by a scale: the sum that a convolution and its skip connection are fused into."""

    values: Tensor
    unit: Tensor

    def real(self) -> Tensor:
        return self.values * self.unit


class ExactModel(nn.Module):
    """A deployed model whose captured regions compute as the target does; called like the model.

    After a call, `levels` holds the integers of every quantizer, by its name.
    """

    def __init__(self, exported: nn.Module) -> None:
        super().__init__()
        self.levels: dict[str, Tensor] = {}
        found = regions(exported)
        if "" in found:
            exported = _ExactRegion(found[""], self.levels)
        else:
            for name, region in found.items():
                parent, _, attribute = name.rpartition(".")
                setattr(exported.get_submodule(parent), attribute, _ExactRegion(region, self.levels))
        self.model = exported

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.levels.clear()
        return self.model(*args, **kwargs)


class _ExactRegion(nn.Module):
    def __init__(self, region: CapturedModule, levels: dict[str, Tensor]) -> None:
        super().__init__()
        self.region = region
        self.interpreter = [_Interpreter(region, levels)]  # in a list: it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        codegen = self.region.graph._codegen
        flat = codegen.process_inputs(*args, **kwargs)
        result = self.interpreter[0].run(*flat, enable_io_processing=False)
        return codegen.process_outputs(result)


class _Interpreter(fx.Interpreter):
    def __init__(self, region: CapturedModule, levels: dict[str, Tensor]) -> None:
        super().__init__(region)
        self.found = levels

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        if n.op == "output":
            return pytree.tree_map(_real, args[0], is_leaf=_is_special)
        if n.op == "call_module" and isinstance(quantizer := module_of(n), ExportedQuantizer):
            return self._quantize(quantizer, args[0])
        kind = kind_of(n)
        if kind in WEIGHTED and n.op == "call_module" and isinstance(args[0], Levels):
            layer = module_of(n)
            if isinstance(getattr(layer, "weight_quantizer", None), ExportedQuantizer):
                return _layer(layer, args[0])
        if kind in TRANSPARENT and isinstance(args[0], Levels):
            return _same_scale(n, super(), args, kwargs)
        if kind is OperatorKind.CONCAT and all(isinstance(a, Levels) for a in args[0]):
            first = args[0][0].ends
            if all(a.ends is first for a in args[0]):
                rest = (torch.cat([a.values for a in args[0]], *args[1:], **kwargs),)
                return Levels(rest[0], first)
        if kind is OperatorKind.ADD and (fused := _fused_sum(n, args)) is not None:
            return fused
        if kind is OperatorKind.ACTIVATION and isinstance(args[0], InUnits) and n.target is torch.ops.aten.relu.default:
            return InUnits(torch.relu(args[0].values), args[0].unit)
        args, kwargs = pytree.tree_map(_real, (args, kwargs), is_leaf=_is_special)
        return getattr(super(), n.op)(n.target, args, kwargs)

    def _quantize(self, quantizer: ExportedQuantizer, x: Any) -> Any:
        if quantizer.weight:
            return quantizer(x)
        ends = _ends(quantizer)
        if quantizer.bounds is not None:
            x = torch.clamp(_real(x), *quantizer.bounds)
        if isinstance(x, InUnits):
            levels = ends.in_units_of(x.unit).levels(x.values)
        else:
            levels = ends.levels(_real(x))
        self.found[quantizer.name] = levels
        return Levels(levels, ends)


def _ends(quantizer: ExportedQuantizer) -> Ends:
    """The same object at every call: concatenation compares grids by identity."""
    cached = getattr(quantizer, "exact_ends", None)
    if cached is None:
        cached = quantizer.exact_ends = Ends.of(quantizer)  # type: ignore[assignment]
    assert isinstance(cached, Ends)
    return cached


def _is_special(value: Any) -> bool:
    return isinstance(value, Levels | InUnits)


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, Levels | InUnits) else value


def _same_scale(node: fx.Node, run: Any, args: Any, kwargs: Any) -> Any:
    x: Levels = args[0]
    result = getattr(run, node.op)(node.target, (x.values, *args[1:]), kwargs)
    return pytree.tree_map(lambda values: Levels(values, x.ends), result)


def _layer(layer: Any, x: Levels) -> Tensor:
    """y = sum * (s_x * s_w) + bias, multiplied and then added in float32; the sum of integer products is exact."""
    quantizer: ExportedQuantizer = layer.weight_quantizer
    axis = None if quantizer.scale.ndim == 0 else quantizer.axis
    integers = torch.round(layer.weight / per_channel(quantizer.scale, axis, layer.weight.ndim))
    zero = x.ends.zero_level
    centered = x.values - zero
    largest = integers.abs().flatten(1).sum(1).max() * max(float(zero), x.ends.steps - float(zero))
    dtype = torch.float32 if float(largest) < EXACT_IN_FLOAT32 else torch.float64
    channel = -1 if isinstance(layer, nn.Linear) else 1
    total = operation(layer)(centered.to(dtype), integers.to(dtype), None).float()
    scale = per_channel(x.ends.scale * quantizer.scale, None if axis is None else channel, total.ndim)
    result: Tensor = total * scale
    return result if layer.bias is None else result + per_channel(layer.bias, channel, total.ndim)


def _fused_sum(node: fx.Node, args: Any) -> InUnits | None:
    """A convolution added to a quantized skip connection: the plugin adds in units of the skip's scale."""
    if len(args) < 2 or node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return None
    for branch, skip, source in ((args[0], args[1], node.args[0]), (args[1], args[0], node.args[1])):
        if not (isinstance(branch, Tensor) and isinstance(skip, Levels) and isinstance(source, fx.Node)):
            continue
        if kind_of(source) is OperatorKind.CONVOLUTION and branch.shape == skip.values.shape:
            unit = skip.ends.scale
            scaled = (branch - skip.ends.zero_level * unit) * (1.0 / unit)
            return InUnits(scaled + skip.values, unit)
    return None
