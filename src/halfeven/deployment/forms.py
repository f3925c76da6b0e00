"""What a runtime's file needs around the same integers: patterns that its optimizer recognizes, and biases it can add.

Each step changes the graph of a deployed model whose quantizers are operators, in place, and no integer that it
computes; only biases move, to the nearest number that the runtime can hold.
"""

import copy
import math
import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.quantize_op import ExportedQuantizer, twin_of
from halfeven.errors import PlacementError
from halfeven.graph.operators import (
    TRANSPARENT,
    WEIGHTED,
    OperatorKind,
    clipping,
    is_float_tensor,
    kind_of,
    module_of,
)
from halfeven.graph.rebuild import CapturedModule, arguments, place
from halfeven.placement.make_plan import regions
from halfeven.quantization.arithmetic import per_channel
from halfeven.targets.target import Target

aten = torch.ops.aten

CONVOLUTIONS = (OperatorKind.CONVOLUTION, OperatorKind.TRANSPOSED_CONVOLUTION)

SPLITS = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default)

NO_BIAS = 1e-30
"""A bias that no float32 number changes by, and that is not 0, which the converter would take away."""

LARGEST_BIAS = 2.0**30
"""Integer biases stay below this, so that a sum of products and bias fits in 32 bits."""


def integer_bias(layer: Any) -> Tensor:
    """The integers of a layer's bias [outputs] on its `bias_grid`, in float64, which holds all 32 bits."""
    return torch.round(layer.bias.double() / layer.bias_grid.double())


def shape_for(model: nn.Module, exported: list[ExportedQuantizer], target: Target) -> None:
    """Give a model with exported quantizers the form that a target's file has.

    Raises:
        PlacementError: the target has no integers for a grid of the model.
    """
    _check_carries(target, exported)
    if target.int32_bias:
        _count_from_zero(exported)
    for name, region in regions(model).items():
        prefix = f"{name}." if name else ""
        if target.int32_bias:
            _take_in_clips(region)
            _write_slices(region)
            _write_global_pools(region)
            _repeat_quantizers(region, exported, prefix)
            _round_biases(region, exported, prefix)
        if target.residual_branch_in_float:
            _keep_branch_roundings(region)
            _keep_scales_apart(region, whole=name == "")
        region.graph.lint()
        region.recompile()


def _check_carries(target: Target, exported: list[ExportedQuantizer]) -> None:
    unsigned = [q.name.removeprefix("quantizers.") for q in exported if not (q.weight or q.signed)]
    if target.signed_only and unsigned:
        raise PlacementError(
            f"{target.name} has signed activations without a zero point alone, and {len(unsigned)} of this model are "
            f'unsigned ({", ".join(unsigned[:3])}): other integers would run. Prepare it with target="{target.name}"; '
            "OpenVINO and ONNX Runtime run such a model too."
        )


def _count_from_zero(exported: list[ExportedQuantizer]) -> None:
    """Write signed activations as unsigned ones: 128 more, and so is their zero point."""
    for quantizer in exported:
        if quantizer.signed and not quantizer.weight:
            quantizer.signed = False
            quantizer.zero_point = quantizer.zero_point + 128
            quantizer.quant_min, quantizer.quant_max = quantizer.quant_min + 128, quantizer.quant_max + 128


def _keep_branch_roundings(region: CapturedModule) -> None:
    """Put an operator that does nothing between a convolution and a quantizer that an addition reads.

    A model made for a runtime that wants integers there has such quantizers. OpenVINO drops the rounding of one that
    is the first to be fused into a convolution before an addition; behind another operator it keeps it.
    """
    for node in list(region.graph.nodes):
        if quantizer_at(node) is None or kind_of(source := node.all_input_nodes[0]) is not OperatorKind.CONVOLUTION:
            continue
        if any(kind_of(user) is OperatorKind.ADD and _reads_grids(user) for user in node.users):
            with region.graph.inserting_before(node):
                same = region.graph.call_function(aten.leaky_relu.default, (source, 1.0))
            same.meta = dict(source.meta)
            node.replace_input_with(source, same)


def _keep_scales_apart(region: CapturedModule, *, whole: bool) -> None:
    """Give convolutions without a bias whose result is read more than once one that changes nothing.

    What a part of a model returns may be read more than once by the Python around it. OpenVINO (2026.4) otherwise moves
    the scale behind such a layer into the quantizer of one of its readers, and all of them read wrong numbers.
    """
    for node in region.graph.nodes:
        if kind_of(node) not in CONVOLUTIONS or node.op != "call_module":
            continue
        if len(node.users) < 2 and (whole or all(user.op != "output" for user in node.users)):
            continue
        layer: Any = module_of(node)
        if layer.bias is None or not bool(layer.bias.any()):
            bias = torch.full((node.meta["val"].shape[1],), NO_BIAS)
            layer.bias = nn.Parameter(bias, requires_grad=False)


def _reads_grids(node: fx.Node) -> bool:
    """Whether all that an operator reads is quantized: in a model made for OpenVINO, one branch of a sum is not."""
    return all(quantizer_at(operand) is not None for operand in node.all_input_nodes)


def quantizer_at(node: fx.Node) -> ExportedQuantizer | None:
    """The quantizer of an activation that a node is, or None."""
    if node.op != "call_module" or not isinstance(module := module_of(node), ExportedQuantizer) or module.weight:
        return None
    return module


def grid_of(node: fx.Node) -> ExportedQuantizer | None:
    """The quantizer on whose grid the values of a node lie, or None; upwards through operators that keep the scale."""
    if (found := quantizer_at(node)) is not None:
        return found
    kind = kind_of(node)
    if kind is OperatorKind.CONCAT:
        grids = [grid_of(operand) for operand in node.all_input_nodes]
        alike = {None if grid is None else grid.grid for grid in grids}
        return grids[0] if len(alike) == 1 else None
    return grid_of(node.all_input_nodes[0]) if kind in TRANSPARENT and node.all_input_nodes else None


def _take_in_clips(region: CapturedModule) -> None:
    """Let quantizers clip integers where activations before them clip numbers: rounding is monotonic, so that is the
    same, and the runtime fuses the layer with the quantizer."""
    for node in list(region.graph.nodes):
        if (quantizer := quantizer_at(node)) is None:
            continue
        clip = node.all_input_nodes[0]
        while (bounds := clipping(clip)) is not None and len(clip.users) == 1:
            low, high = (_integer_of(quantizer, bound) for bound in bounds)
            quantizer.quant_min = int(max(quantizer.quant_min, min(low, quantizer.quant_max)))
            quantizer.quant_max = int(min(quantizer.quant_max, max(high, quantizer.quant_min)))
            source = clip.all_input_nodes[0]
            clip.replace_all_uses_with(source)
            region.graph.erase_node(clip)
            clip = source


def _integer_of(quantizer: ExportedQuantizer, bound: float) -> float:
    return bound if math.isinf(bound) else float(torch.round(bound / quantizer.scale) + quantizer.zero_point)


def _write_slices(region: CapturedModule) -> None:
    """Write the parts of a split as slices, which the runtime cuts out of integers."""
    for node in list(region.graph.nodes):
        if node.target not in SPLITS or not all(user.target is operator.getitem for user in node.users):
            continue
        given = arguments(node)
        source, dim = given["self"], given["dim"]
        sizes = [part.shape[dim] for part in node.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            continue  # along the free batch
        for part in list(node.users):
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
        source, shape = node.all_input_nodes[0], node.meta["val"]
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
    given = arguments(node)
    if node.target is not aten.mean.dim:
        sizes = given["output_size"]
        return all(size == 1 for size in sizes)
    dims = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
    return sorted(d % ndim for d in dims) == list(range(2, ndim))


def _repeat_quantizers(region: CapturedModule, exported: list[ExportedQuantizer], prefix: str) -> None:
    """After each operator that keeps the scale, its input's quantizer once more: between two such pairs the runtime
    runs the operator on integers."""
    count = 0
    for node in list(region.graph.nodes):
        if kind_of(node) not in (*TRANSPARENT, OperatorKind.CONCAT) or not is_float_tensor(node):
            continue
        if (quantizer := grid_of(node)) is None or all(user.op == "output" for user in node.users):
            continue
        count += 1
        path = f"quantizers.repeated_{count}"
        twin = twin_of(quantizer, prefix + path, exported)
        twin.repeats = True
        twin.quant_min, twin.quant_max = (-128, 127) if twin.signed else (0, 255)
        place(region, path, twin)
        with region.graph.inserting_after(node):
            again = region.graph.call_module(path, (node,))
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again, delete_user_cb=partial(operator.is_not, again))


def _round_biases(region: CapturedModule, exported: list[ExportedQuantizer], prefix: str) -> None:
    """Put the biases of layers that multiply integers on the grid of their products."""
    for node in region.graph.nodes:
        if node.op != "call_module" or kind_of(node) not in WEIGHTED:
            continue
        layer: Any = module_of(node)
        grid = grid_of(node.all_input_nodes[0])
        if layer.bias is None or grid is None or not hasattr(layer, "weight_quantizer"):
            continue
        if not hasattr(layer, "bias_grid"):
            _round_bias(layer, grid.scale)
        elif layer.input_grid != grid.grid:  # the same layer on other integers: their products have another grid
            layer = _own_copy(region, node, layer, exported, prefix)
            _round_bias(layer, grid.scale)
        layer.input_grid = grid.grid


def _own_copy(region: CapturedModule, node: fx.Node, layer: Any, exported: list[ExportedQuantizer], prefix: str) -> Any:
    path = f"{node.target}_on_{node.all_input_nodes[0].name}"
    copied = copy.deepcopy(layer)
    copied.weight_quantizer = twin_of(layer.weight_quantizer, f"{prefix}{path}.weight_quantizer", exported)
    copied.bias = nn.Parameter(layer.unrounded_bias, requires_grad=False)
    place(region, path, copied)
    node.target = path
    return copied


def _round_bias(layer: Any, input_scale: Tensor) -> None:
    quantizer: ExportedQuantizer = layer.weight_quantizer
    layer.unrounded_bias = layer.bias.detach()
    needed = layer.bias.abs() / (input_scale * LARGEST_BIAS)
    if bool((needed > quantizer.scale).any()) and quantizer.scale.ndim:
        # Weights so small that the bias has no place on their grid: a coarser grid is theirs, of fewer integers.
        scale = torch.maximum(quantizer.scale, needed)
        axis = quantizer.axis
        integers = torch.round(layer.weight / per_channel(scale, axis, layer.weight.ndim))
        layer.weight = nn.Parameter(integers * per_channel(scale, axis, layer.weight.ndim), requires_grad=False)
        quantizer.scale = scale
    layer.bias_grid = input_scale * quantizer.scale
    layer.bias = nn.Parameter((integer_bias(layer) * layer.bias_grid.double()).float(), requires_grad=False)
