"""ONNX Runtime's form of a deployed model: patterns that its optimizer makes integer kernels of, biases as integers.

Each pass changes the graph of a deployed model, in place, and no integer that it computes; only biases move, to the
nearest number that the runtime can hold.
"""

import copy
import math
import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.deployed import Deployed, Int32Bias
from halfeven.deployment.grids import grid_of, quantizer_at
from halfeven.deployment.quantize_op import ExportedQuantizer, repeat_quantizer, twin_of
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.placement.make_plan import regions
from halfeven.quantization.arithmetic import per_channel
from halfeven.quantization.model_quantizers import has_quantized_weight
from halfeven.runtimes.onnxruntime.channel_bounds import write_bounds_as_sums

aten = torch.ops.aten


LARGEST_BIAS = 2.0**30
"""Integer biases stay below this, so that a sum of products and bias fits in 32 bits."""


def prepare_graph(deployed: Deployed) -> None:
    """Give a deployed model the patterns and the integer biases of ONNX Runtime, in place."""
    # In this order: clips and repeated quantizers take the grids without a sign, and biases the scales that are final.
    _count_from_zero(deployed.quantizers)
    for name, region in regions(deployed.model).items():
        prefix = f"{name}." if name else ""
        _move_clips_into_quantizers(region)
        _write_clips(region)
        write_bounds_as_sums(region, deployed.quantizers, prefix)
        _write_slices(region)
        _write_global_pools(region)
        _repeat_quantizers(region, deployed.quantizers, prefix)
        _round_biases(region, deployed, prefix)
        region.graph.lint()
        region.recompile()


def _count_from_zero(exported: list[ExportedQuantizer]) -> None:
    """Write signed activations as unsigned ones on x86, whose integer kernels take no others: 128 is added to the
    integers and to the zero point."""
    for quantizer in exported:
        if quantizer.signed and not quantizer.weight:
            quantizer.signed = False
            quantizer.zero_point = quantizer.zero_point + 128
            quantizer.quant_min = quantizer.quant_min + 128
            quantizer.quant_max = quantizer.quant_max + 128


def _move_clips_into_quantizers(region: CapturedModule) -> None:
    """Clip integers in quantizers where activations before them clip numbers.

    Rounding is monotonic, so the result is the same, and the runtime fuses the layer with the quantizer.
    """
    for node in list(region.graph.nodes):
        if (quantizer := quantizer_at(node)) is None:
            continue
        clip = node.all_input_nodes[0]
        while (bounds := Op(clip).bounds) is not None and len(clip.users) == 1:
            # round(x / s) + z does not decrease with x: to clip x at a bound is to clip its integer at the bound's
            # integer.
            low = _integer_of(quantizer, bounds[0])
            high = _integer_of(quantizer, bounds[1])
            # Both ends stay within the grid: a bound beyond it clips nothing that the grid does not clip itself.
            quantizer.quant_min = int(max(quantizer.quant_min, min(low, quantizer.quant_max)))
            quantizer.quant_max = int(min(quantizer.quant_max, max(high, quantizer.quant_min)))
            source = clip.all_input_nodes[0]
            clip.replace_all_uses_with(source)
            region.graph.erase_node(clip)
            clip = source


def _write_clips(region: CapturedModule) -> None:
    """Write clips that read a matrix product of two axes, and stay in float, as a maximum and a minimum.

    The runtime looks for a quantizer behind Gemm and Relu or Clip, and computes Gemm in float where there is none.
    """
    for node in list(region.graph.nodes):
        bounds = Op(node).bounds
        source = node.all_input_nodes[0] if bounds is not None else node
        if bounds is None or kind_of(source) is not OperatorKind.LINEAR or source.meta["val"].ndim != 2:
            continue
        clipped = source
        for of_both, bound in ((aten.maximum.default, bounds[0]), (aten.minimum.default, bounds[1])):
            if not math.isinf(bound):
                with region.graph.inserting_before(node):
                    limit = region.graph.call_function(aten.scalar_tensor.default, (bound,))
                    clipped = region.graph.call_function(of_both, (clipped, limit))
                limit.meta = {"val": torch.tensor(bound)}
                clipped.meta = dict(node.meta)
        node.replace_all_uses_with(clipped)
        region.graph.erase_node(node)


def _integer_of(quantizer: ExportedQuantizer, bound: float) -> float:
    return bound if math.isinf(bound) else float(torch.round(bound / quantizer.scale) + quantizer.zero_point)


def _write_slices(region: CapturedModule) -> None:
    """Write the parts of a split as slices, which the runtime cuts out of integers."""
    for node in list(region.graph.nodes):
        if not Op(node).row.splits or not all(user.target is operator.getitem for user in node.users):
            continue
        given = Op(node).arguments
        source = given["self"]
        dim = given["dim"]
        sizes = [part.shape[dim] for part in node.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            continue  # along the free batch
        for part in list(node.users):
            # The parts lie one behind the other along the axis.
            start = sum(sizes[: part.args[1]])
            with region.graph.inserting_before(part):
                cut = region.graph.call_function(aten.slice.Tensor, (source, dim, start, start + sizes[part.args[1]]))
            cut.meta = dict(part.meta)
            part.replace_all_uses_with(cut)
            region.graph.erase_node(part)
        region.graph.erase_node(node)


def _write_global_pools(region: CapturedModule) -> None:
    """Write means over all positions as the pool that the runtime has an integer kernel for, its quantizer behind."""
    for node in list(region.graph.nodes):
        if not _is_global_mean(node):
            continue
        source = node.all_input_nodes[0]
        shape = node.meta["val"]
        keeps = shape.ndim == source.meta["val"].ndim
        with region.graph.inserting_before(node):
            pooled = region.graph.call_function(torch.ops.halfeven.global_average_pool.default, (source,))
        pooled.meta = dict(node.meta)
        readers = list(node.users)
        quantized = readers[0] if len(readers) == 1 and quantizer_at(readers[0]) is not None else None
        node.replace_all_uses_with(pooled)
        region.graph.erase_node(node)
        if keeps:
            continue
        # The pool keeps the axes that the mean drops, and a flatten drops them behind the quantizer, which must follow
        # the pool.
        last = pooled if quantized is None else quantized
        pooled.meta["val"] = _with_kept_axes(shape, source.meta["val"].ndim)
        last.meta["val"] = pooled.meta["val"]
        with region.graph.inserting_after(last):
            flat = region.graph.call_function(aten.flatten.using_ints, (last, 1))
        flat.meta = {"val": shape}
        last.replace_all_uses_with(flat, delete_user_cb=partial(operator.is_not, flat))


def _with_kept_axes(value: Tensor, ndim: int) -> Tensor:
    while value.ndim < ndim:
        value = value.unsqueeze(-1)
    return value


def _is_global_mean(node: fx.Node) -> bool:
    if node.target not in (aten.mean.dim, aten.adaptive_avg_pool2d.default):
        return False
    ndim = node.all_input_nodes[0].meta["val"].ndim
    if ndim != 4:
        return False  # the integer kernel takes images alone
    given = Op(node).arguments
    if node.target is not aten.mean.dim:
        sizes = given["output_size"]
        return all(size == 1 for size in sizes)
    dims = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
    return sorted(d % ndim for d in dims) == list(range(2, ndim))


def _repeat_quantizers(region: CapturedModule, exported: list[ExportedQuantizer], prefix: str) -> None:
    """Insert the quantizer of its input again behind each operator that keeps the scale.

    Between two such quantizers the runtime runs the operator on integers.
    """
    count = 0
    for node in list(region.graph.nodes):
        if kind_of(node) not in (*TRANSPARENT, OperatorKind.CONCAT) or not Op(node).is_float_tensor:
            continue
        # A tensor that is returned, and not read, needs no integers.
        if (quantizer := grid_of(node)) is None or all(user.op == "output" for user in node.users):
            continue
        count += 1
        repeat_quantizer(region, node, quantizer, f"quantizers.repeated_{count}", prefix, exported)


def _round_biases(region: CapturedModule, deployed: Deployed, prefix: str) -> None:
    """Put the biases of layers that multiply integers on the grid of their products."""
    names = {module: name for name, module in deployed.model.named_modules()}
    unrounded: dict[nn.Module, tuple[int, Tensor]] = {}  # layer -> number of its input's grid, its bias as it was
    for node in region.graph.nodes:
        if node.op != "call_module" or kind_of(node) not in WEIGHTED:
            continue
        layer: Any = module_of(node)
        grid = grid_of(node.all_input_nodes[0])
        if layer.bias is None or grid is None or not has_quantized_weight(layer):
            continue
        if layer not in unrounded:
            unrounded[layer] = (grid.grid_number, layer.bias.detach())
            deployed.int32_biases[names[layer]] = _round_bias(layer, grid.scale)
        elif (
            unrounded[layer][0] != grid.grid_number
        ):  # the same layer on other integers: their products have another grid
            copied, name = _copy_layer_of_call(region, node, unrounded[layer][1], deployed, prefix)
            deployed.int32_biases[name] = _round_bias(copied, grid.scale)


def _copy_layer_of_call(
    region: CapturedModule, node: fx.Node, bias: Tensor, deployed: Deployed, prefix: str
) -> tuple[Any, str]:
    """Give a call of a layer a copy of the layer, with a bias of its own; return the copy and its name."""
    layer: Any = module_of(node)
    path = f"{node.target}_on_{node.all_input_nodes[0].name}"
    copied = copy.deepcopy(layer)
    copied.weight_quantizer = twin_of(layer.weight_quantizer, f"{prefix}{path}.weight_quantizer", deployed.quantizers)
    # The bias as it was before it was rounded to the grid of the first call.
    copied.bias = nn.Parameter(bias, requires_grad=False)
    place(region, path, copied)
    node.target = path
    return copied, f"{prefix}{path}"


def _round_bias(layer: Any, input_scale: Tensor) -> Int32Bias:
    """Put a layer's bias on the grid of its products, and its weights on a coarser grid where that grid is too fine."""
    quantizer: ExportedQuantizer = layer.weight_quantizer
    # The smallest weight scale s_w for which bias / (s_x s_w) stays below the bound.
    needed = layer.bias.abs() / (input_scale * LARGEST_BIAS)
    if not quantizer.scale.ndim:
        needed = needed.max()  # one scale for all channels, so that the largest bias decides
    if bool((needed > quantizer.scale).any()):
        # Weights so small that the bias has no place on their grid: a coarser grid is theirs, of fewer integers.
        scale = torch.maximum(quantizer.scale, needed)
        axis = quantizer.axis
        integers = torch.round(layer.weight / per_channel(scale, axis, layer.weight.ndim))
        layer.weight = nn.Parameter(integers * per_channel(scale, axis, layer.weight.ndim), requires_grad=False)
        quantizer.scale = scale
    # White paper, section 2.1: the accumulator counts in steps of s_w s_x, and so does the bias in it, without a zero
    # point.
    scale = input_scale * quantizer.scale
    layer.bias = nn.Parameter(Int32Bias.of(layer.bias, scale).real(), requires_grad=False)
    return Int32Bias.of(layer.bias, scale)
