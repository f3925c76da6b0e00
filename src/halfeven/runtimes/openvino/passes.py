"""OpenVINO's form of a deployed model: what keeps its CPU plugin from moving or dropping a rounding.

Each pass changes the graph of a deployed model, in place, and no integer that it computes.
"""

from typing import Any

import torch
from torch import fx, nn

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.grids import grid_of, quantizer_at
from halfeven.deployment.quantize_op import ExportedQuantizer, repeat_quantizer
from halfeven.graph.model_inputs import constant_size
from halfeven.graph.operators import TRANSPARENT, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.placement.make_plan import regions
from halfeven.runtimes.openvino.clips_of_channels import write_clips_of_channels
from halfeven.runtimes.openvino.sums_in_kernels import mark_sums

CONVOLUTIONS = (OperatorKind.CONVOLUTION, OperatorKind.TRANSPOSED_CONVOLUTION)

NO_BIAS = 1e-30
"""A bias that no float32 number changes by, and that is not 0, which the converter would take away."""


def prepare_graph(deployed: Deployed) -> None:
    """Give a deployed model the operators that keep OpenVINO's optimizer from changing its integers, in place."""
    for name, region in regions(deployed.model).items():
        _keep_branch_roundings(region)
        _keep_scales_apart(region, whole=name == "")
        _repeat_behind_free_sizes(region, deployed.quantizers, f"{name}." if name else "")
        write_clips_of_channels(region)
        mark_sums(region)
        region.graph.lint()
        region.recompile()


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
                # A leaky ReLU of slope 1 is the identity, and neither the converter nor the plugin takes it away.
                same = region.graph.call_function(torch.ops.aten.leaky_relu.default, (source, 1.0))
            same.meta = dict(source.meta)
            node.replace_input_with(source, same)


def _keep_scales_apart(region: CapturedModule, *, whole: bool) -> None:
    """Give a bias that changes nothing to each convolution without a bias whose result is read more than once.

    What a part of a model returns may be read more than once by the Python around it. OpenVINO (2026.4) otherwise moves
    the scale behind such a layer into the quantizer of one of its readers, and all of them read wrong numbers.
    """
    for node in region.graph.nodes:
        if kind_of(node) not in CONVOLUTIONS or node.op != "call_module":
            continue
        if len(node.users) < 2 and (whole or all(user.op != "output" for user in node.users)):
            continue
        layer: Any = module_of(node)
        # The converter drops a bias of zeros too.
        if layer.bias is None or not bool(layer.bias.any()):
            bias = torch.full((node.meta["val"].shape[1],), NO_BIAS)
            layer.bias = nn.Parameter(bias, requires_grad=False)


def _repeat_behind_free_sizes(region: CapturedModule, exported: list[ExportedQuantizer], prefix: str) -> None:
    """Insert the quantizer of its input again behind each operator that integers pass at fixed sizes alone.

    The plugin (2026.4) moves integers through a nearest resize whose sizes are constants, and the writer changes pools
    that round up, shifts and repetitions to operators that they pass; neither is possible where sizes are free. The
    layer behind would run in float.
    """
    count = 0
    for node in list(region.graph.nodes):
        if not _needs_fixed_sizes(node) or (quantizer := grid_of(node)) is None:
            continue
        if any(constant_size(size) is None for size in Op(node).shape[1:]):
            count += 1
            repeat_quantizer(region, node, quantizer, f"quantizers.repeated_{count}", prefix, exported)


def _needs_fixed_sizes(node: fx.Node) -> bool:
    op = Op(node)
    if not op.is_function or kind_of(node) not in TRANSPARENT or not op.is_float_tensor:
        return False
    return op.name.startswith(("upsample_nearest", "roll", "repeat")) or (
        op.row.takes_maximum and bool(op.arguments.get("ceil_mode"))
    )


def _reads_grids(node: fx.Node) -> bool:
    """Return True if all inputs of an operator are quantized; in a model made for OpenVINO, one branch of a sum is
    not."""
    return all(quantizer_at(operand) is not None for operand in node.all_input_nodes)
