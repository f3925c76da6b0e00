"""Mark the calls of modules for stochastic depth while a model is traced: in eval mode they would leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halfeven.graph.operators import is_stochastic_depth


@torch.library.custom_op("halfeven::leaf", mutates_args=())
def _mark_leaf(x: Tensor, name: str) -> Tensor:
    return x.clone()


@_mark_leaf.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


@contextmanager
def leaf_markers(model: nn.Module) -> Iterator[None]:
    """Mark the calls of modules for stochastic depth within the context: in eval mode they would leave no trace."""
    marked = [(name, module) for name, module in model.named_modules() if is_stochastic_depth(module)]
    for name, module in marked:
        # An attribute of the instance hides the class's method; `del` in the end makes the method visible again.
        module.forward = lambda x, *_, name=name: torch.ops.halfeven.leaf(x, name)
    try:
        yield
    finally:
        for _, module in marked:
            del module.forward
