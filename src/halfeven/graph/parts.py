"""The modules of a captured model that its graph does not call: containers, and modules whose operators stand in it.

They hold what the float model's hold, so that a trainer's code finds it: children by name, index and loop, plain
attributes, and methods. A call of one, and a hook on one, could do nothing, and says so.
"""

import copy
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, nn

from halfeven.errors import CaptureError, HalfevenWarning
from halfeven.graph.torch_private import own_modules, pytree, set_contents

INTERNAL = {*vars(nn.Module()), "forward"}
"""Attributes of every module, which belong to torch."""

SEQUENCES = (nn.Sequential, nn.ModuleList)
CONTAINERS = (*SEQUENCES, nn.ModuleDict)
INDEXING = ("__getitem__", "__len__", "__iter__", "__contains__")


@dataclass(frozen=True)
class Original:
    """The module of the float model that a module of a captured model stands for."""

    kind: type[nn.Module]
    path: str
    children: tuple[str, ...]
    """Names of its own submodules, in their order."""
    attributes: tuple[str, ...] = ()
    """Names of its plain attributes."""


class Part(nn.Module):
    """A module that the graph of a captured model does not call."""

    halfeven_original: Original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"{self._path_and_class()} was called on its own, and cannot be: its operators are a part of the captured "
            "model's graph, with quantizers between them. Call the whole model; read a layer's output by a forward "
            "hook on that layer; or name the submodule in leave_out=[...] to keep it as it is, in float."
        )

    def _path_and_class(self) -> str:
        return f"{self.halfeven_original.path} ({self.halfeven_original.kind.__name__})"

    def _report_hook(self) -> None:
        warnings.warn(
            f"A hook was registered on {self._path_and_class()}, which the captured model never calls: the hook will "
            "not run. Register it on a layer that the model calls, such as a convolution, a linear layer or a "
            "BatchNorm.",
            HalfevenWarning,
            stacklevel=3,
        )

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._report_hook()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._report_hook()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._report_hook()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._report_hook()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.halfeven_original.kind.__name__}, in the graph"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        # Without this method `copy.deepcopy` would call `__reduce_ex__`, which leaves out what a pickle cannot hold.
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        vars(result).update(copy.deepcopy(vars(self), memo))
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        original, state = picklable(self.halfeven_original, vars(self))
        return _unpickled_part, (original.kind,), state


def _unpickled_part(kind: type[nn.Module]) -> Part:
    cls = part_class(kind)
    return cls.__new__(cls)


def called_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model with their names, without parts: those whose hooks can run."""
    return [(name, module) for name, module in model.named_modules() if not isinstance(module, Part)]


def part_of(module: nn.Module, path: str) -> Part:
    """Return an empty part that stands for a module of the float model."""
    result = part_class(original_class(module))()
    remember(result, module, path)
    return result


PART_CLASSES: dict[type[nn.Module], type[Part]] = {}


def part_class(kind: type[nn.Module]) -> type[Part]:
    """Return the class of the parts that stand for modules of a class, with its methods."""
    if kind not in PART_CLASSES:
        PART_CLASSES[kind] = type("Part", (Part,), {"__module__": __name__})
        give_methods(PART_CLASSES[kind], kind)
    return PART_CLASSES[kind]


def arrange(root: nn.Module, original: nn.Module) -> None:
    """Give a captured module the tree of the float model: its modules in their order, attributes and methods.

    Args:
        root: the captured module, with its layers, parameters and buffers.
        original: the float model.
    """
    remember(root, original, "")
    give_methods(type(root), type(original))
    for path, module in original.named_modules(remove_duplicate=False):
        owner = _owner_of(root, path)
        name = path.rpartition(".")[2]
        if owner is None or not name:
            continue
        # Taken out and put in again, one after the other, so that the children have the float model's order.
        children = own_modules(owner)
        child = children.pop(name, None)
        if child is None and not (owner is root or isinstance(owner, Part)):
            continue  # a part of a layer that is a single operator in the graph
        children[name] = _make_part(child, module, path) if child is None or type(child) is nn.Module else child


def complete(result: nn.Module, state: dict[str, Any]) -> None:
    """Give a captured module all submodules, tensors and attributes of another's state (its `vars`), in its order."""
    set_contents(result, state)
    original = state.get("halfeven_original")
    if original is not None:
        vars(result)["halfeven_original"] = original
        vars(result).update({name: state[name] for name in original.attributes})
        give_methods(type(result), original.kind)


def _owner_of(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None


def _make_part(holder: nn.Module | None, module: nn.Module, path: str) -> Part:
    """Return the part for a float module, with the tensors and submodules of the module in its place."""
    part = part_of(module, path)
    if holder is not None:
        set_contents(part, vars(holder))
    return part


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a float module; of a part, the class that it stands for."""
    return module.halfeven_original.kind if isinstance(module, Part) else type(module)


def remember(result: nn.Module, module: nn.Module, path: str) -> None:
    """Give a module of a captured model the plain attributes of the float module that it stands for."""
    kept = {
        name: value
        for name, value in vars(module).items()
        if name not in INTERNAL and not hasattr(result, name) and _is_plain_value(value)
    }
    vars(result).update(kept)
    original = Original(original_class(module), path, tuple(own_modules(module)), tuple(kept))
    vars(result)["halfeven_original"] = original


def _is_plain_value(value: Any) -> bool:
    """Return True unless a value holds a module of the float model, or a trace of its forward pass, such as a size."""
    # A bound method holds its module.
    leaves = [getattr(leaf, "__self__", leaf) for leaf in pytree.tree_leaves(value)]
    return not any(isinstance(leaf, nn.Module | SymInt | SymFloat | SymBool) or _is_computed(leaf) for leaf in leaves)


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.grad_fn is not None or type(value) not in (Tensor, nn.Parameter))


def give_methods(cls: type[nn.Module], kind: type[nn.Module]) -> None:
    """Give a class of captured modules the methods, properties and indexing of a float module's class."""
    for base in kind.__mro__:
        if base in (nn.Module, object):  # a mixin may come after
            continue
        if base in CONTAINERS:
            _give_children(cls, dict_like=base is nn.ModuleDict)
            break
        for name, value in vars(base).items():
            # Indexing is the float class's; all other special methods stay torch's.
            is_special = name.startswith("__") and name not in INDEXING
            if not is_special and not hasattr(cls, name):
                setattr(cls, name, _with_explanation(value, kind) if isinstance(value, types.FunctionType) else value)


def _with_explanation(function: Callable[..., Any], kind: type[nn.Module]) -> Callable[..., Any]:
    """Return a method that says where it comes from when it fails on a captured model."""

    @wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(self, *args, **kwargs)
        except Exception as error:
            error.add_note(
                f"{function.__name__} is a method of the float model's {kind.__name__}, called on its captured form, "
                "whose submodules cannot be called on their own and which is no instance of that class (super() does "
                "not work)."
            )
            raise

    return method


def _give_children(cls: type[nn.Module], *, dict_like: bool) -> None:
    """Give a class the indexing of torch's containers, over the children of the float model's container alone."""
    for name, function in (DICT_METHODS if dict_like else SEQUENCE_METHODS).items():
        if name not in vars(cls):
            setattr(cls, name, function)


def _children(self: Any) -> dict[str, nn.Module]:
    return {name: getattr(self, name) for name in self.halfeven_original.children}


def _get_by_index(self: Any, index: int | slice) -> nn.Module:
    children = list(_children(self).values())
    if not isinstance(index, slice):
        return children[index]
    chosen = children[index]
    start, _, step = index.indices(len(children))
    # A slice is a container of its own. As in torch, that of a Sequential keeps the names of its children, and any
    # other counts them from 0.
    keeps_names = issubclass(self.halfeven_original.kind, nn.Sequential)
    names = self.halfeven_original.children[index] if keeps_names else tuple(map(str, range(len(chosen))))
    result = part_class(self.halfeven_original.kind)()
    for name, child in zip(names, chosen, strict=True):
        result.add_module(name, child)
    path = f"{self.halfeven_original.path}[{start}:{start + len(chosen) * step}:{step}]"
    vars(result)["halfeven_original"] = Original(self.halfeven_original.kind, path, names)
    return result


def _length(self: Any) -> int:
    return len(self.halfeven_original.children)


def _iterate(self: Any) -> Iterator[nn.Module]:
    return iter(_children(self).values())


def _get_by_key(self: Any, key: str) -> nn.Module:
    return _children(self)[key]


def _keys(self: Any) -> Any:
    return _children(self).keys()


def _values(self: Any) -> Any:
    return _children(self).values()


def _items(self: Any) -> Any:
    return _children(self).items()


SEQUENCE_METHODS: dict[str, Any] = {"__getitem__": _get_by_index, "__len__": _length, "__iter__": _iterate}
DICT_METHODS: dict[str, Any] = {
    "__getitem__": _get_by_key,
    "__len__": _length,
    "__iter__": lambda self: iter(_children(self)),
    "__contains__": lambda self, key: key in self.halfeven_original.children,
    "keys": _keys,
    "values": _values,
    "items": _items,
}


def picklable(original: Original, attributes: dict[str, Any]) -> tuple[Original, dict[str, Any]]:
    """Return the picklable part of the class and of the plain attributes that a module has from the float model.

    A class that cannot be imported, such as a class inside of a function, gives way to the first class above it that
    can; so its methods are lost in a pickle, and attributes such as functions without a name.
    """
    kind = next(base for base in original.kind.__mro__ if _can_be_imported(base))
    lost = {name for name in original.attributes if name in attributes and not _can_be_pickled(attributes[name])}
    kept = tuple(name for name in original.attributes if name not in lost)
    changed = Original(kind, original.path, original.children, kept)
    state = {name: value for name, value in attributes.items() if name not in lost}
    return changed, state | {"halfeven_original": changed}


def _can_be_imported(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # any kind: each type has its own
        return False
    return True
