"""Fused operators written out, so that the tensors inside them can be quantized."""

from typing import Any

import torch
from torch import fx

from halfeven.graph.restoration import CapturedModule, arguments

aten = torch.ops.aten


def lower_attention(region: CapturedModule) -> int:
    """Write scaled dot-product attention as its products and softmax, in place; how many were.

    The scale multiplies the scores after the product, where the integers of query and key have met already.
    """
    nodes = [n for n in region.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    lowered = [node for node in nodes if _lower(region, node)]
    region.recompile()
    return len(lowered)


def _lower(region: CapturedModule, node: fx.Node) -> bool:
    values = arguments(node)
    if values["is_causal"] or values.get("enable_gqa"):
        return False  # a causal mask is made of sizes; such a layer stays whole, in float, and the plan says so
    query, key = values["query"], values["key"]
    width = query.meta["val"].shape[-1]
    scale = values["scale"] if values["scale"] is not None else float(width) ** -0.5
    graph = region.graph

    def call(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        new.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
        with torch.no_grad():
            fakes = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
            new.meta["val"] = _evaluate(target, fakes)
        return new

    with graph.inserting_before(node):
        scores = call(aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1)), scale)
        mask = values["attn_mask"]
        if mask is not None and mask.meta["val"].dtype is torch.bool:
            scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), float("-inf"))
        elif mask is not None:
            scores = call(aten.add.Tensor, scores, mask)
        result = call(aten.matmul.default, call(aten.softmax.int, scores, -1), values["value"])
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _evaluate(target: Any, fakes: list[Any]) -> Any:
    mode = next(f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
    with mode:
        return target(*fakes)
