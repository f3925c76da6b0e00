"""Copy a model that may hold the results of an earlier call."""

import copy
from typing import Any

from torch import Tensor, nn

from halfeven.graph.torch_private import pytree


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a model, also of one that keeps a tensor of its last call with the history of its gradient.

    Such a tensor, which torch refuses to copy, is copied without the history: the older `weight_norm` and
    `spectral_norm` compute the weight anew in each call, and keep it until the next.

    Args:
        model: any module.
        memo: what the copy shares with the model, by `id`, as for `copy.deepcopy`.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in pytree.tree_leaves(dict(vars(module)))
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, {**computed, **(memo or {})})
