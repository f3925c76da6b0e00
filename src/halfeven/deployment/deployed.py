"""The deployed form of a quantized model: BatchNorm folded, weights on their integer grids, training forgotten.

Writers write it and the exact simulation computes it, so that they agree by construction.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.errors import CalibrationError
from halfeven.graph.batchnorm import foldable, folding, forget_statistics, output_axis, remove, split_shared
from halfeven.graph.constants import fold_constants
from halfeven.graph.copying import copy_model
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule, build_module, place
from halfeven.graph.view import Op, kind_of, module_of, replace_call
from halfeven.placement.folded_batchnorm import settle_live
from halfeven.placement.make_plan import regions
from halfeven.placement.quantized_layers import QUANTIZED_LAYERS
from halfeven.placement.tied_weights import tied_parameters, untie
from halfeven.quantization.arithmetic import dequantize, quantize, snap
from halfeven.quantization.quantizer import Quantizer, quantizers
from halfeven.targets.target import Target


@dataclass(frozen=True, eq=False)
class Int32Bias:
    """A layer's bias as 32-bit integers on the grid of the layer's products."""

    integers: Tensor
    """[outputs], in float64, which holds all 32 bits."""
    scale: Tensor
    """[outputs], or [] where the weight has one scale."""

    @staticmethod
    def of(bias: Tensor, scale: Tensor) -> "Int32Bias":
        """Round a bias [outputs] to a grid."""
        return Int32Bias(torch.round(bias.double() / scale.double()), scale)

    def real(self) -> Tensor:
        """Return the numbers that the integers stand for, in float32."""
        return (self.integers * self.scale.double()).float()


@dataclass(frozen=True, eq=False)
class Deployed:
    """A quantized model in the form that a runtime's file has.

    The passes of the runtime change it in place; then writers write it, and the exact simulation computes it.
    """

    model: nn.Module
    """BatchNorm folded, weights on their grids, quantizers written as operators."""
    quantizers: list[ExportedQuantizer]
    """The model's quantizers, in the order of their numbers."""
    target: Target
    """The rules of the runtime that the form is for."""
    int32_biases: dict[str, Int32Bias] = field(default_factory=dict)
    """Biases that the file holds as integers, by their layers' names."""


@torch.no_grad()
def deployed_form(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model in the form that runs: in eval mode, BatchNorm folded, weights on their grids.

    A BatchNorm after a layer with quantized weights multiplies that layer's scales (white paper, section 4.2 c): the
    integers stay what they were, but for the sign where gamma is negative. The result still simulates in float.

    Raises:
        CalibrationError: a quantizer has no range yet.
    """
    for name, quantizer in quantizers(qmodel).items():
        if not quantizer.state.has_range and not (quantizer.weight and quantizer.state.observing):
            raise CalibrationError(
                f"The quantizer {name} has no range yet, so there are no integers to deploy. "
                "Run halfeven.calibrate(qmodel, loader) first, or load a checkpoint."
            )
    model = copy_model(qmodel).cpu().float().eval()
    forget_statistics(model)  # buffers, which an exported program would carry along
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    untie(model, tied_parameters(model))  # what is done to a layer's weight below is done to that layer's alone
    settled: set[nn.Module] = set()
    for region in regions(model).values():
        region.execution_graph = None  # exporters trace what runs, and shall see the graph as it is
        settle_live(region)
        _remove_identities(region)
        # A weight's quantizer stays: the layer that reads it is quantized.
        fold_constants(region, lambda module: isinstance(module, Quantizer) and module.weight)
        _make_modules(region)
        split_shared(region)
        norms = dict(foldable(region.graph))
        calls = [node for node in region.graph.nodes if node.op == "call_module"]
        for call in [node for node in calls if hasattr(module_of(node), "weight_quantizer")]:
            if (layer := module_of(call)) not in settled:  # a layer may be called more than once
                settled.add(layer)
                _settle(region, call, norms.get(call))
        region.recompile()
    for quantizer in quantizers(model).values():
        if not (quantizer.weight and quantizer.state.observing):
            quantizer.fix()
    return model


def _remove_identities(region: CapturedModule) -> None:
    for node in list(region.graph.nodes):
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # a view needs the copy that is taken out before it
        if kind_of(node) is not OperatorKind.IDENTITY:
            continue
        if node.op == "call_module":
            remove(region, node)
        else:
            node.replace_all_uses_with(node.all_input_nodes[0])
            region.graph.erase_node(node)


def _settle(region: CapturedModule, node: fx.Node, norm: fx.Node | None) -> None:
    """Put a layer's weight on its grid, and fold the BatchNorm that follows it."""
    layer: Any = module_of(node)
    quantizer: Quantizer = layer.weight_quantizer
    scale = quantizer.used_scale(layer.weight)
    integers = quantize(layer.weight, scale, torch.zeros_like(scale), quantizer.scheme)
    scheme = quantizer.scheme
    if norm is not None:
        factor, bias = folding(module_of(norm), layer.bias)
        axis = output_axis(node)
        scale, integers = _scaled(scale, integers, factor, axis)
        scheme = dataclasses.replace(scheme, axis=axis)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        remove(region, norm)
    else:
        scale = snap(scale)
    if (found := _multiplication(region, node)) is not None:
        multiplication, factor = found
        scale, integers = _scaled(scale, integers, factor, output_axis(node))
        scheme = dataclasses.replace(scheme, axis=output_axis(node))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias * factor, requires_grad=False)
        multiplication.replace_all_uses_with(node)
        region.graph.erase_node(multiplication)
    frozen = Quantizer(scheme, channels=None if scheme.axis is None else scale.numel(), weight=True, observer="mse")
    frozen.name = quantizer.name
    frozen.fix_scale(scale)
    layer.weight_quantizer = frozen.eval()
    layer.weight = nn.Parameter(dequantize(integers, scale, torch.zeros_like(scale), scheme), requires_grad=False)
    layer.int32_bias = False  # the runtime's passes round biases


def _multiplication(region: CapturedModule, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """Return the multiplication that alone reads a layer (layer scale) and its constants, one for each output channel.

    None where there is no such multiplication.

    It goes into the layer's scales as a BatchNorm does: runtimes would do the same, and lose the layer's name.
    """
    calls = [other for other in region.graph.nodes if other.op == "call_module" and other.target == node.target]
    reader = next(iter(node.users)) if len(node.users) == 1 and len(calls) == 1 else None
    if reader is None or reader.target is not torch.ops.aten.mul.Tensor:
        return None
    (constant,) = [a for a in reader.args if a is not node] or [node]
    if isinstance(constant, int | float):
        values = torch.tensor(float(constant))
    elif isinstance(constant, fx.Node) and constant.op == "get_attr":
        values = Op(constant).constant
    else:
        return None
    shape = node.meta["val"].shape
    ndim = node.meta["val"].ndim
    axis = ndim - 1 if kind_of(node) is OperatorKind.LINEAR else 1
    wide = (1,) * (ndim - values.ndim) + tuple(values.shape)
    if len(wide) != ndim or any(size != 1 for place, size in enumerate(wide) if place != axis):
        return None
    return reader, values.detach().float().flatten().expand(shape[axis])


def _make_modules(region: CapturedModule) -> None:
    """Make modules of quantized layers that are functions, where their weight and bias are constants by now."""
    for node in list(region.graph.nodes):
        if not Op(node).is_function or kind_of(node) not in WEIGHTED or Op(node).row.module is None:
            continue
        quantized = node.args[1]
        bias = Op(node).arguments["bias"]
        if quantized.op != "call_module" or not isinstance(quantizer := module_of(quantized), Quantizer):
            continue
        parts = {"weight": quantized.all_input_nodes[0]} | ({} if bias is None else {"bias": bias})
        if all(part.op == "get_attr" for part in parts.values()):
            _make_module(region, node, quantizer, parts)


def _make_module(region: CapturedModule, node: fx.Node, quantizer: Quantizer, parts: dict[str, fx.Node]) -> None:
    quantized = node.all_input_nodes[1]
    path = str(quantized.target).removeprefix("quantizers.").removesuffix("_weight")
    holder = nn.Module()
    place(region, path, holder)
    with region.graph.inserting_before(node):
        for name, part in parts.items():
            holder.register_parameter(name, nn.Parameter(Op(part).constant.detach(), requires_grad=False))
            node.update_arg(("input", "weight", "bias").index(name), region.graph.get_attr(f"{path}.{name}"))
    built = build_module(node, region)
    assert built is not None
    layer: Any = built[1]
    layer.__class__ = QUANTIZED_LAYERS[type(layer)]
    layer.weight_quantizer = quantizer
    place(region, path, layer)
    replace_call(node, path, (node.args[0],))
    region.graph.erase_node(quantized)
    region.delete_submodule(str(quantized.target))


def recoverable(scale: Tensor, steps: int = 254) -> Tensor:
    """Return the nearest scale that survives being written as limits low and high: (high - low) / steps gives it back.

    A scale that a BatchNorm multiplies is not snapped to 16 bits: that would move every output of its channel by up to
    1 / 131072, and so change integers that the trained model rounds otherwise.
    """
    for _ in range(4):
        end = scale * (steps // 2)
        found = (end + end) / steps
        if torch.equal(found, scale):
            return scale
        scale = found
    return snap(scale)


def _scaled(scale: Tensor, integers: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return scale and integers of a weight whose output channels a BatchNorm multiplies by `factor`, which may be 0
    or negative."""
    shape = [1] * integers.ndim
    shape[axis] = -1
    folded = recoverable((scale.double() * factor.abs()).float())
    dead = folded < torch.finfo(torch.float32).tiny
    # A channel that gamma = 0 silences has no integers left; any positive scale represents it.
    folded = torch.where(dead, torch.ones_like(folded), folded)
    sign = torch.where(dead, 0.0, torch.sign(factor).float())
    return folded, integers * sign.reshape(shape)
