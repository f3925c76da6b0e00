"""Replace in-place operators by their functional form, because a quantizer's tensor must not change afterwards."""

import torch
from torch import fx

from halfeven.graph.torch_private import functional_form, is_operator
from halfeven.graph.view import Op, keep_tensor_name, nodes_after, replace_call

aten = torch.ops.aten


def make_functional(node: fx.Node) -> None:
    """Replace an in-place operator by its functional form, in place; other nodes stay.

    Later readers of the changed tensor read the result. Where the tensor is a part of a larger tensor
    (`x[:, 1:] += y`), later readers of the larger tensor read it with that part exchanged.
    """
    functional = functional_form(node.target) if is_operator(node.target) else None
    if functional is None:
        return
    node.target = functional
    changed = node.args[0]
    assert isinstance(changed, fx.Node)
    if functional is aten.copy.default:
        _write_as_expansion(node, changed)
    later = nodes_after(node)
    # Only nodes after the change: those before it read the tensor as it was.
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)
    _write_back(node, changed, later)


def _write_as_expansion(node: fx.Node, changed: fx.Node) -> None:
    """Replace `copy` by its source, expanded to the overwritten shape: torch has no derivative of `copy` itself."""
    source = node.args[1]
    if isinstance(source, fx.Node) and Op(source).value.dtype == Op(changed).value.dtype:
        replace_call(node, aten.expand_as.default, (source, changed))


def _write_back(result: fx.Node, view: fx.Node, later: set[fx.Node]) -> None:
    # Each turn goes from a view (`x[:, 1:]`) to the tensor that it is a view of, until a tensor with its own memory.
    # What a restored module returns is no view, and the module itself is not in place yet.
    while Op(view).is_function and (scatter := Op(view).row.scatter) is not None:
        base = view.args[0]
        assert isinstance(base, fx.Node)
        # A view of the whole tensor (`x[:]`): the result is the new tensor, and nothing is put into place.
        if Op(view).shape == Op(base).shape:
            whole = result
        else:
            with result.graph.inserting_after(result):
                # torch has for each view the operator that puts a changed view back into its base, such as slice and
                # slice_scatter.
                whole = result.graph.call_function(scatter, (base, result, *view.args[1:]))
            whole.meta = dict(base.meta)
        base.replace_all_uses_with(whole, delete_user_cb=lambda user: user in later)
        result = whole
        view = base


def allow_copies(region: fx.GraphModule) -> None:
    """Replace views by reshapes, in place: what can be viewed at the example's sizes may need a copy at others.

    torch.export leaves out a `contiguous` that copies nothing on the example.
    """
    for node in region.graph.find_nodes(op="call_function", target=aten.view.default):
        keep_tensor_name(node, Op(node).tensor_name)
        replace_call(node, aten.reshape.default, (node.args[0], node.args[1]))
    region.recompile()
