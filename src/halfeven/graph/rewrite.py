"""Rewrite graphs: expand operators, so that the tensors inside of them can be quantized, and merge equal operators."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import fx

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import is_operator, is_pure, pytree
from halfeven.graph.view import Op, keep_tensor_name, record_value

aten = torch.ops.aten

DROPOUT = "halfeven_dropout"
"""Key in the metadata of an attention, and then of its softmax: the probability of its dropout in training."""


def lower_attention(region: CapturedModule) -> int:
    """Expand scaled dot-product attention into its products and softmax, in place.

    softmax(scale * query key^T + mask) value. The scale multiplies the product, not the query, so that the product
    reads the quantized query and key.

    Returns:
        The number of expanded operators.
    """
    nodes = [n for n in region.graph.nodes if is_attention(Op(n))]
    lowered = [node for node in nodes if _expand_attention(region, node)]
    region.recompile()
    return len(lowered)


def is_attention(op: Op) -> bool:
    """Return True for a call of torch's function for scaled dot-product attention."""
    return op.node.target is aten.scaled_dot_product_attention.default


def _expand_attention(region: CapturedModule, node: fx.Node) -> bool:
    values = Op(node).arguments
    if values["is_causal"] or values.get("enable_gqa"):
        return False  # a causal mask depends on sizes; such an operator stays whole, in float, and the plan says so
    query = values["query"]
    key = values["key"]
    width = Op(query).shape[-1]
    # torch's default: 1 / sqrt(width of a head).
    scale = values["scale"] if values["scale"] is not None else float(width) ** -0.5
    graph = region.graph
    call = calls_before(node)
    with graph.inserting_before(node):
        scores = call(aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1)), scale)
        mask = values["attn_mask"]
        if mask is not None and Op(mask).value.dtype is torch.bool:
            # torch's boolean masks are True where a position takes part, and masked_fill fills where its mask is True.
            scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), float("-inf"))
        elif mask is not None:
            scores = call(aten.add.Tensor, scores, mask)
        weights = call(aten.softmax.int, scores, -1)
        weights.meta[DROPOUT] = node.meta.get(DROPOUT, 0.0)
        result = call(aten.matmul.default, weights, values["value"])
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


GATES = {aten.silu.default: aten.sigmoid.default, aten.hardswish.default: aten.hardsigmoid.default}
"""Activation x * gate(x) -> its gate."""


def expand_gates(region: CapturedModule, chosen: Callable[[fx.Node], bool]) -> int:
    """Write SiLU and hard-swish as the product of their input and its gate, in place.

    x * sigmoid(x), and x * relu6(x + 3) / 6 (MobileNetV3, arXiv 1905.02244, section 5.2). The gate is a tensor of its
    own then, which can be quantized.

    Args:
        region: a graph of the model.
        chosen: True for an input whose activation is expanded; others stay one operator.

    Returns:
        The number of expanded operators.
    """
    expanded = 0
    for node in [node for node in region.graph.nodes if node.target in GATES]:
        x = node.args[0]
        if not chosen(x):
            continue
        call = calls_before(node)
        expanded += 1
        with region.graph.inserting_before(node):
            result = call(aten.mul.Tensor, x, call(GATES[node.target], x))
        node.replace_all_uses_with(result)
        region.graph.erase_node(node)
    region.recompile()
    return expanded


def lower_stacked_sums(region: CapturedModule) -> int:
    """Replace each sum over a stack of tensors by additions, in place; additions have integer kernels.

    It also avoids an error of OpenVINO (2026.4): where two stacks read the same tensor, the results are wrong, because
    each stack is written in place.

    Returns:
        The number of replaced sums.
    """
    lowered = 0
    for node in list(region.graph.nodes):
        if node.target is not aten.sum.dim_IntList:
            continue
        stack = node.args[0]
        values = Op(node).arguments
        if stack.target is not aten.stack.default or len(stack.users) != 1 or values["keepdim"] or values["dtype"]:
            continue
        given = Op(stack).arguments
        ndim = Op(stack).ndim
        # Only the stacked axis may be summed.
        if [axis % ndim for axis in values["dim"]] != [given["dim"] % ndim]:
            continue
        call = calls_before(node)
        with region.graph.inserting_before(node):
            total = reduce(lambda left, right: call(aten.add.Tensor, left, right), given["tensors"])
        node.replace_all_uses_with(total)
        region.graph.erase_node(node)
        region.graph.erase_node(stack)
        lowered += 1
    region.recompile()
    return lowered


def lower_scatters(region: CapturedModule) -> int:
    """Write sums and means over segments (`index_add`, `scatter_reduce`) as `scatter_add`, in place.

    OpenVINO's converter knows neither of them, and ONNX's exporter writes a mean as the last value of each segment.

    Returns:
        The number of operators that were written out.
    """
    found = [node for node in region.graph.nodes if node.target in SCATTERS]
    written = 0
    for node in found:
        with region.graph.inserting_before(node):
            result = SCATTERS[node.target](calls_before(node), Op(node).arguments)
        if result is None:
            continue
        take_the_place_of(node, result)
        written += 1
    region.recompile()
    return written


def _scatter_of_index_add(call: Callable[..., fx.Node], values: dict[str, Any]) -> fx.Node | None:
    """Return the sum of rows by one index: it becomes an index for each element."""
    source = values["source"]
    ndim = Op(source).ndim
    if ndim == 0 or Op(values["index"]).ndim != 1:
        return None
    axis = values["dim"] % ndim
    if values["alpha"] != 1:
        source = call(aten.mul.Tensor, source, values["alpha"])
    index = values["index"]
    for place in range(ndim):
        if place != axis:
            index = call(aten.unsqueeze.default, index, place)
    return call(aten.scatter_add.default, values["self"], axis, call(aten.expand_as.default, index, source), source)


def _scatter_of_reduction(call: Callable[..., fx.Node], values: dict[str, Any]) -> fx.Node | None:
    """Return a sum or a mean of the elements with one index; of the tensor's own too with `include_self`."""
    own, axis, index, source = (values[name] for name in ("self", "dim", "index", "src"))
    if values["reduce"] not in ("sum", "mean"):
        return None
    if not values["include_self"]:
        own = call(aten.scatter.value, own, axis, index, 0.0)
    total = call(aten.scatter_add.default, own, axis, index, source)
    if values["reduce"] == "sum":
        return total
    # Elements without any of the source are divided by 1.
    ones = call(aten.ones_like.default, own)
    start = ones if values["include_self"] else call(aten.scatter.value, ones, axis, index, 0.0)
    return call(
        aten.div.Tensor,
        total,
        call(aten.scatter_add.default, start, axis, index, call(aten.ones_like.default, source)),
    )


SCATTERS = {aten.index_add.default: _scatter_of_index_add, aten.scatter_reduce.two: _scatter_of_reduction}


def merge_duplicates(region: CapturedModule) -> int:
    """Eliminate common subexpressions, in place: equal operators on equal inputs.

    NASNet's branches each apply a ReLU to the same tensor. Runtimes merge such operators, so their quantizers must be
    merged too.

    Returns:
        The number of removed nodes.
    """
    known: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(region.graph.nodes):
        # Modules stay apart: two calls of a dropout, or of a BatchNorm in training, are not equal.
        if not (Op(node).is_function and is_operator(node.target) and is_pure(node.target)):
            continue
        try:
            first = known.setdefault((node.target, hashable(node.args), hashable(node.kwargs)), node)
        except TypeError:  # an argument that cannot be hashed
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            region.graph.erase_node(node)
            merged += 1
    region.recompile()
    return merged


def hashable(value: Any) -> Any:
    """Return the arguments of a call as a key, equal for equal arguments of the same types."""
    if isinstance(value, list | tuple):
        return tuple(hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, hashable(item)) for key, item in sorted(value.items()))
    # The type too: 1, 1.0 and True are equal in Python, and give an operator other results.
    return type(value), value


def take_the_place_of(node: fx.Node, result: fx.Node) -> None:
    """Let a node's readers read another node, which gets the name of its tensor, and erase it."""
    keep_tensor_name(result, Op(node).tensor_name)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def calls_before(node: fx.Node) -> Callable[..., fx.Node]:
    """Return a function that adds calls of operators in the place of a node, with their results recorded."""

    def call(target: Any, *args: Any) -> fx.Node:
        new = node.graph.call_function(target, args)
        # The module that the operator belongs to: names of tensors and rules for modules follow it.
        new.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
        with torch.no_grad():
            fakes = fx.node.map_arg(args, lambda a: Op(a).value)
            record_value(new, _evaluate_fakes(target, fakes))
        return new

    return call


def _evaluate_fakes(target: Any, fakes: tuple[Any, ...]) -> Any:
    # The recorded values are torch.export's fake tensors, which have shapes and no data; results must belong to the
    # same fake mode, or its symbols for free sizes would not match.
    mode = next(f.fake_mode for f in pytree.tree_leaves(fakes) if hasattr(f, "fake_mode"))
    with mode:
        return target(*fakes)
