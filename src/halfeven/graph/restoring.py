"""Restore what a call of a model leaves in its attributes: caches, counters, the tensors of the last batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

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


def _is_cache(name: str, value: Any) -> bool:
    return name not in OWN_FIELDS and isinstance(value, dict | list | set) and type(value).__module__ == "builtins"


def put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a dict its former entries, in place."""
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value
