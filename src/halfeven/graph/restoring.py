"""Restore what a call of a model changes: attributes, buffers, and the states of random number generators."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from halfeven.graph.torch_private import own_buffers

SEED = 0

OWN_FIELDS = frozenset(vars(nn.Module()))
"""The fields in which torch keeps parameters, submodules and hooks."""


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of a model's modules at the end, and the entries of the dicts and lists among them.

    LeViT keeps its attention biases in a dict in eval mode: a graph that is captured after a call would have them as
    constants, and training would leave the parameters that they are made of as they are. Lazy modules, which a first
    call completes, stay complete.
    """
    # Attributes are compared by identity; containers that stay the same object are copied, because their entries may
    # change.
    modules = [module for module in model.modules() if not isinstance(module, LazyModuleMixin)]
    attributes = [dict(vars(module)) for module in modules]
    containers = [(value, value.copy()) for had in attributes for name, value in had.items() if _is_cache(name, value)]
    try:
        yield
    finally:
        for module, had in zip(modules, attributes, strict=True):
            put_back(vars(module), had)
        for container, entries in containers:
            if isinstance(container, list):
                container[:] = entries
            else:
                container.clear()
                container.update(entries)


@contextmanager
def state_restored(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Restore the attributes of a model's modules at the end, and the values of its buffers and of some parameters."""
    modules = list(model.modules())
    buffers = [dict(own_buffers(module)) for module in modules]
    tensors = [*parameters, *(b for held in buffers for b in held.values() if b is not None)]
    values = [(tensor, tensor.detach().clone()) for tensor in {id(t): t for t in tensors}.values()]
    try:
        with attributes_restored(model):
            yield
    finally:
        # A forward pass may have put another tensor in a buffer's place: first the tensors are put back, then their
        # values.
        for module, held in zip(modules, buffers, strict=True):
            put_back(own_buffers(module), held)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.data.copy_(value)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Set all random states to the same for each run within the context, and restore them at the end."""
    python = random.getstate()
    numpy = np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _is_cache(name: str, value: Any) -> bool:
    return name not in OWN_FIELDS and isinstance(value, dict | list | set) and type(value).__module__ == "builtins"


def put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a dict its former entries, in place."""
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value
