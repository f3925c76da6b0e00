"""The dropout inside of attention, which the graph of eval mode lacks: restored where torch's own module has it."""

from torch import fx, nn

from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import is_attention
from halfeven.graph.tree import place
from halfeven.graph.view import Op, operations

NAME = "attention_dropout"
"""Name of the dropout among the parts of its `nn.MultiheadAttention`."""


def add_attention_dropouts(region: CapturedModule, original: nn.Module) -> int:
    """Put the dropout of each `nn.MultiheadAttention` behind its softmax, in place.

    Args:
        region: a graph whose attention is written as products and a softmax.
        original: the module that it was captured of.

    Returns:
        The number of calls of a dropout that were added.
    """
    added = 0
    for op in operations(region.graph):
        attention = _torch_attention(op, original) if op.kind is OperatorKind.SOFTMAX else None
        if attention is None or attention.dropout == 0:
            continue
        path = f"{op.path}.{NAME}" if op.path else NAME
        if path not in dict(region.named_modules()):  # a module that is called several times has one
            place(region, path, nn.Dropout(attention.dropout).train(region.training))
        _call_behind(op.node, path)
        added += 1
    if added:
        region.recompile()
    return added


def lost_attention_dropouts(captured: nn.Module, original: nn.Module, called: int) -> int:
    """Return how many calls of attention have a dropout in the original's training that the captured model lacks.

    Args:
        captured: the captured model, before its attention is written as products.
        original: the model.
        called: how many calls of torch's function for attention, outside of its module, the original gave a dropout.
    """
    alone = 0
    lost = 0
    for prefix, region in captured.named_modules():
        if not isinstance(region, CapturedModule):
            continue
        part = original.get_submodule(prefix)
        for op in filter(is_attention, operations(region.graph)):
            attention = _torch_attention(op, part)
            alone += attention is None
            lost += attention is not None and attention.dropout > 0 and bool(op.argument("is_causal"))
    return lost + min(called, alone)


def _torch_attention(op: Op, original: nn.Module) -> nn.MultiheadAttention | None:
    """Return the `nn.MultiheadAttention` whose own code calls an operator; None for any other code."""
    try:
        module = original.get_submodule(op.path)
    except AttributeError:  # the code of no module
        return None
    return module if isinstance(module, nn.MultiheadAttention) else None


def _call_behind(node: fx.Node, path: str) -> None:
    with node.graph.inserting_after(node):
        dropped = node.graph.call_module(path, (node,))
    dropped.meta = {key: value for key, value in node.meta.items() if key != "halfeven_name"}
    node.replace_all_uses_with(dropped, delete_user_cb=lambda reader: reader is not dropped)
