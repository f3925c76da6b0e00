"""Undo a change of channels for some readers of a tensor."""

import torch
from torch import Tensor, fx, nn

from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.quantization.quantizer import Quantizer


class ChannelAffine(nn.Module):
    """A factor and an offset of each channel of the last axis: factor * x + offset, in float, not trained.

    Args:
        channels: size of the last axis.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a tensor, directly or through its quantizer."""
    found = []
    for user in node.users:
        through = isinstance(Op(user).module, Quantizer)
        found += list(user.users) if through else [user]
    return found


def rescaling_of(node: fx.Node) -> ChannelAffine | None:
    """Return the `ChannelAffine` through which some readers read a tensor; None if there is none."""
    for user in node.users:
        if isinstance(module := Op(user).module, ChannelAffine):
            return module
    return None


def insert_rescaling(region: CapturedModule, node: fx.Node, name: str) -> None:
    """Insert a `ChannelAffine`, an identity for now, between a LayerNorm and the additions that read its output.

    The additions compute in float, so they read the tensor as it is before its quantizer. A second call has no effect.
    """
    if rescaling_of(node) is not None:
        return
    norm = module_of(node)
    assert isinstance(norm, nn.LayerNorm)
    affine = ChannelAffine(norm.normalized_shape[-1]).to(norm.weight)
    path = f"rescaling.{name.replace('.', '_').replace(':', '_')}"
    place(region, path, affine.train(region.training))
    # Looked for before the new node is inserted, which reads the tensor too.
    additions = [reader for reader in readers(node) if kind_of(reader) is OperatorKind.ADD]
    with region.graph.inserting_after(node):
        rescaled = region.graph.call_module(path, (node,))
    rescaled.meta = dict(node.meta)
    for addition in additions:
        for read in list(addition.all_input_nodes):
            if read is node or (node in read.all_input_nodes and isinstance(Op(read).module, Quantizer)):
                addition.replace_input_with(read, rescaled)
