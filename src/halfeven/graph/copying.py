"""Copy a model that may hold the results of an earlier call, or modules that are wrapped."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CaptureError
from halfeven.graph.torch_private import own_buffers, pytree
from halfeven.graph.wrappers import has_mixed_forward, take_off_mixed_forward, unwrapped, wrapped_module


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a model, without wrappers such as `torch.compile` around it or its submodules.

    A tensor that a module keeps of its last call with the history of its gradient, which torch refuses to copy, is
    copied without the history: the older `weight_norm` and `spectral_norm` compute the weight anew in each call, and
    keep it until the next.

    Args:
        model: any module.
        memo: what the copy shares with the model, by `id`, as for `copy.deepcopy`.

    Raises:
        CaptureError: something in the model cannot be copied.
    """
    model = unwrapped(model)
    computed: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in pytree.tree_leaves([dict(vars(module)), dict(own_buffers(module))])
        if isinstance(value, Tensor) and not value.is_leaf
    }
    # `deepcopy` returns what is in its memo in place of a copy.
    known = {**computed, **(memo or {})}
    try:
        # From the innermost wrapper outwards: each copy is in the memo when the module around it is copied.
        for module in reversed([m for m in model.modules() if wrapped_module(m) is not None]):
            known[id(module)] = copy.deepcopy(unwrapped(module), known)
        copied = copy.deepcopy(model, known)
    except (RuntimeError, TypeError) as error:
        raise CaptureError(
            f"This {type(model).__name__} cannot be copied, and halfeven never changes the float model itself: "
            f"{error} Look for what a module keeps beside its parameters and buffers: a tensor with a gradient's "
            "history (detach it before it is kept), an open file, a lock."
        ) from error
    take_off_mixed_forward(copied)
    return copied


def float32_model(model: nn.Module) -> nn.Module:
    """Return a model without wrappers, in the precision of its files: float32, also after `model.bfloat16()`."""
    model = unwrapped(model)
    converted = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    return copy_model(model).float() if converted or has_mixed_forward(model) else model
