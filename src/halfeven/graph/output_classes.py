"""Classes of a model's inputs and outputs that torch does not know: dataclasses, and subclasses of dict.

`torch.export` takes tuples, lists, dicts, named tuples and what is registered. Models return classes of their own,
whose fields name the outputs of a file.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from halfeven.graph.torch_private import pytree


def register_classes(values: Iterable[Any]) -> None:
    """Make torch know the classes in some values, and in the fields of these, for good.

    Args:
        values: inputs or outputs of models and modules.
    """
    waiting = list(values)
    while waiting:
        # What torch does not know is a leaf.
        found = [leaf for leaf in pytree.tree_leaves(waiting.pop()) if _register(type(leaf), leaf)]
        waiting += found


def _register(kind: type, value: Any) -> bool:
    """Register a class, if it is of a kind that can be; return True if it was."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        torch.export.register_dataclass(kind)
        return True
    if not isinstance(value, dict):
        return False
    pytree.register_pytree_node(
        kind,
        lambda found: (list(found.values()), list(found)),
        lambda values, keys: kind(zip(keys, values, strict=True)),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=lambda found: ([(pytree.MappingKey(key), x) for key, x in found.items()], list(found)),
    )
    return True
