"""The deployed form of a quantized model: BatchNorm folded, weights on their integer grids, training forgotten.

Writers write it and the exact simulation computes it, so that they agree by construction.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.epilogue import epilogue, folded_epilogue, split_by_epilogue
from halfeven.deployment.file_interface import FileInterface
from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.errors import CalibrationError
from halfeven.graph.batchnorm import forget_statistics, layer_calls, output_axis, remove_module
from halfeven.graph.build_module import build_module
from halfeven.graph.constants import fold_constants
from halfeven.graph.copying import copy_model
from halfeven.graph.labels import remove_loss
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.training_outputs import remove_training_outputs
from halfeven.graph.tree import place
from halfeven.graph.view import Op, kind_of, module_of, replace_call
from halfeven.graph.wrappers import unwrapped
from halfeven.placement.folded_batchnorm import settle_live
from halfeven.placement.make_plan import regions
from halfeven.placement.quantized_layers import QUANTIZED_LAYERS
from halfeven.placement.tied_weights import tied_parameters, untie
from halfeven.quantization.arithmetic import dequantize, quantize, snap
from halfeven.quantization.model_quantizers import has_quantized_weight, quantizers
from halfeven.quantization.quantizer import Quantizer
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
        # In float64: an integer of 32 bits does not fit in float32's 24.
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
    interface: FileInterface | None = None
    """Names and facts to write into the file; None: the converters' own names."""


@torch.no_grad()
def deployed_form(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model in the form that runs: in eval mode, BatchNorm folded, weights on their grids.

    A BatchNorm after a layer with quantized weights multiplies that layer's scales (white paper, section 4.2 c): the
    integers stay what they were, but for the sign where gamma is negative. The result still simulates in float.

    Raises:
        CalibrationError: a quantizer has no range yet.
    """
    qmodel = unwrapped(qmodel)
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
        remove_loss(region)
        remove_training_outputs(region)
        region.execution_graph = None  # exporters trace what runs, and shall see the graph as it is
        # In this order: BatchNorms that are folded live are part of the weights first; identities and constants give
        # way, so that the arithmetic behind a layer is seen as such; layers become modules, whose epilogues are then
        # taken in.
        settle_live(region)
        _remove_identities(region)
        # A weight's quantizer stays: the layer that reads it is quantized.
        fold_constants(region, lambda module: isinstance(module, Quantizer) and module.weight)
        _make_layer_modules(region)
        split_by_epilogue(region)
        for calls in layer_calls(region.graph).values():
            layer = module_of(calls[0])
            if has_quantized_weight(layer) and layer not in settled:  # parts of a model may share a layer
                settled.add(layer)
                _deploy_weight(region, calls)
        region.recompile()
    for quantizer in quantizers(model).values():
        # A weight that is computed, and observed, has its range from `forward` alone: there is nothing to fix.
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
            remove_module(region, node)
        else:
            node.replace_all_uses_with(node.all_input_nodes[0])
            region.graph.erase_node(node)


def _deploy_weight(region: CapturedModule, calls: list[fx.Node]) -> None:
    """Put a layer's weight on its grid, and take in the BatchNorms and the arithmetic that follow each call of it."""
    # The weight and the scale are those of all calls; so are the epilogues, after `split_by_epilogue`.
    node = calls[0]
    layer: Any = module_of(node)
    quantizer: Quantizer = layer.weight_quantizer
    scale = quantizer.used_scale(layer.weight)
    # The integers that were trained. From here on only their scale changes, and their sign where gamma is negative.
    integers = quantize(layer.weight, scale, torch.zeros_like(scale), quantizer.scheme)
    scheme = quantizer.scheme
    # White paper, section 4.2 (c): a factor of each output channel multiplies the scales and leaves the integers.
    if behind := epilogue(node):
        factor, bias = folded_epilogue(behind, node, layer.bias)
        scale, integers = _scale_integers(scale, integers, factor, output_axis(node))
        scheme = dataclasses.replace(scheme, axis=output_axis(node))
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for call in calls:
            _remove_chain(region, epilogue(call))
    else:
        scale = snap(scale)
    frozen = Quantizer(scheme, channels=None if scheme.axis is None else scale.numel(), weight=True, observer="mse")
    frozen.name = quantizer.name
    frozen.fix_scale(scale)
    layer.weight_quantizer = frozen.eval()
    layer.weight = nn.Parameter(dequantize(integers, scale, torch.zeros_like(scale), scheme), requires_grad=False)
    layer.int32_bias = False  # the runtime's passes round biases


def _remove_chain(region: CapturedModule, nodes: list[fx.Node]) -> None:
    """Remove a chain of operators: the readers of the last operator then read the input of the first.

    Each operator of the chain is the only reader of the operator before it.
    """
    for node in reversed(nodes):
        if Op(node).is_module:
            remove_module(region, node)
            continue
        (source,) = [operand for operand in node.all_input_nodes if not Op(operand).is_constant]
        node.replace_all_uses_with(source)
        region.graph.erase_node(node)


def _make_layer_modules(region: CapturedModule) -> None:
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
            _make_layer_module(region, node, quantizer, parts)


def _make_layer_module(region: CapturedModule, node: fx.Node, quantizer: Quantizer, parts: dict[str, fx.Node]) -> None:
    quantized = node.all_input_nodes[1]
    path = str(quantized.target).removeprefix("quantizers.").removesuffix("_weight")
    holder = nn.Module()
    place(region, path, holder)
    with region.graph.inserting_before(node):
        # Parameters under the names of a module's, by which `build_module` knows a layer, as it does in capture.
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
        # As a reader of the file computes it: from limits of -127 and 127 steps, rounded to float32.
        end = scale * (steps // 2)
        found = (end + end) / steps
        if torch.equal(found, scale):
            return scale
        scale = found
    return snap(scale)


def _scale_integers(scale: Tensor, integers: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return scale and integers of a weight whose output channels a BatchNorm multiplies by `factor`.

    A factor may be 0 or negative.
    """
    shape = [1] * integers.ndim
    shape[axis] = -1
    # A scale is positive: the sign of the factor goes to the integers, whose narrow grid has the negative of each.
    folded = recoverable((scale.double() * factor.abs()).float())
    dead = folded < torch.finfo(torch.float32).tiny
    # A channel that gamma = 0 silences has no integers left; any positive scale represents it.
    folded = torch.where(dead, torch.ones_like(folded), folded)
    sign = torch.where(dead, 0.0, torch.sign(factor).float())
    return folded, integers * sign.reshape(shape)
