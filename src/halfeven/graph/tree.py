"""Put modules, parameters and buffers at dotted paths of a module."""

from collections.abc import Callable
from typing import Any

from torch import nn

from halfeven.graph.parts import part_of
from halfeven.graph.torch_private import is_persistent, own_buffers, own_modules, own_parameters


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path; missing parents become empty modules."""
    owner, name = owner_of(root, path)
    owner.add_module(name, module)


def displace(root: nn.Module, path: str) -> None:
    """Put a part, which holds nothing, in the place of a module that the graph does not call any more."""
    place(root, path, part_of(root.get_submodule(path), path))


def adopt(root: nn.Module, source: nn.Module, convert: Callable[[Any], Any]) -> None:
    """Give `root` every parameter and buffer of `source` that it lacks, at the same path, each through `convert`."""
    # `remove_duplicate=False`: tied parameters keep every name they have, and state dicts keep their keys.
    for path, parameter in source.named_parameters(remove_duplicate=False):
        owner, name = owner_of(root, path)
        if name not in own_parameters(owner):
            owner.register_parameter(name, convert(parameter))
    for prefix, module in source.named_modules(remove_duplicate=False):
        for name, buffer in own_buffers(module).items():
            if buffer is None:
                continue
            owner, _ = owner_of(root, f"{prefix}.{name}" if prefix else name)
            if name not in own_buffers(owner):
                owner.register_buffer(name, convert(buffer), persistent=is_persistent(module, name))


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds the end of a dotted path, and the name there; missing modules are made, empty."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in own_modules(root):
            root.add_module(parent, nn.Module())
        child = own_modules(root)[parent]
        assert child is not None
        root = child
    return root, name


def has_value(root: nn.Module, path: str) -> bool:
    """Return True if a module has anything but None at a dotted path."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return value is not None
