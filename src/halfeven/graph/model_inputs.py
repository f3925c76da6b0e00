"""The input tensors of a captured model: their names, the sizes that capture fixed, and the axes that are free."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.errors import InputError
from halfeven.graph.batches import Inputs
from halfeven.graph.torch_private import input_keywords, pytree
from halfeven.graph.view import unique_name

BATCH = "batch"
"""Name of a free first axis that the user gives no name."""


@dataclass(frozen=True)
class ModelInput:
    """An input tensor: its name, and for each axis its size or, where any size is possible, the axis's name."""

    name: str
    sizes: tuple[int | str, ...]

    @property
    def free(self) -> dict[int, str]:
        """The names of the free axes by their numbers."""
        return {axis: size for axis, size in enumerate(self.sizes) if isinstance(size, str)}


def model_inputs(model: nn.Module, inputs: Inputs, free: Sequence[Mapping[int, str]]) -> Inputs:
    """Return the inputs of a model: arguments with a `ModelInput` for each tensor and None for any other leaf.

    Args:
        model: the model, whose forward names the inputs.
        inputs: the example.
        free: for each leaf the names of its free axes, by their numbers.
    """
    leaves, form = pytree.tree_flatten(inputs)
    described: list[ModelInput | None] = []
    for name, leaf, axes in zip(leaf_names(model, *inputs), leaves, free, strict=True):
        sizes = tuple(axes.get(axis, size) for axis, size in enumerate(getattr(leaf, "shape", ())))
        described.append(ModelInput(name, sizes) if isinstance(leaf, Tensor) else None)
    result: Inputs = pytree.tree_unflatten(described, form)
    return result


def region_inputs(graph: fx.Graph, described: Inputs) -> tuple[ModelInput | None, ...]:
    """Return the inputs of a captured graph in its order, with the sizes that torch.export made constants."""
    args, kwargs = described
    ordered = pytree.tree_leaves((args, {name: kwargs[name] for name in input_keywords(graph)}))
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    return tuple(known and _as_captured(known, value) for known, value in zip(ordered, values, strict=True))


def _as_captured(known: ModelInput, value: Tensor) -> ModelInput:
    constants = map(constant_size, value.shape)
    pairs = zip(known.sizes, constants, strict=True)
    return ModelInput(known.name, tuple(size if found is None else found for size, found in pairs))


def constant_size(size: Any) -> int | None:
    """Return a recorded size; None for a free one. torch.export writes some constants as symbols, too."""
    return int(str(size)) if str(size).isdigit() else None


def leaf_names(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """Return a name for each leaf of a call's arguments, in the order of `pytree.tree_leaves((args, kwargs))`.

    The name is that of the parameter of the model's forward, with the place inside it where an argument contains
    several leaves: "images_0", "state_mask".
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    # Numbers stand for the leaves, so that the place of each is known after the arguments are bound to their
    # parameters.
    placed_args, placed_kwargs = pytree.tree_unflatten(list(range(len(leaves))), form)
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind(*placed_args, **placed_kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    names = [""] * len(leaves)
    for name, place in zip(path_names(bound), pytree.tree_leaves(bound), strict=True):
        names[place] = name
    return names


def path_names(tree: Any, alone: str = "") -> list[str]:
    """Return a name for each leaf of a tree: the keys on the way to it, joined with underscores.

    Args:
        tree: tensors in tuples, lists, dicts or classes.
        alone: name of a tree that is a single leaf; it also precedes names that would begin with a number.
    """
    names: list[str] = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        words = [str(_tree_key(entry)) for entry in path]
        name = "_".join(([alone] if alone and not (words and not words[0].isdigit()) else []) + words)
        names.append(unique_name(name, names))
    return names


def _tree_key(entry: Any) -> Any:
    """Return the key, index or field of one step into a tree."""
    return next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name))


def check_sizes(inputs: Sequence[ModelInput | None], values: Sequence[Any], part: str = "") -> None:
    """Check the sizes of a call's tensors against those that a captured graph can compute.

    Args:
        inputs: the graph's inputs; None for one that is no tensor.
        values: the call's leaves, in the same order.
        part: name of the captured part of the model; "" for the whole model.

    Raises:
        InputError: a tensor has another size than the example's at an axis that is not free, or two axes of one name
            have different sizes.
    """
    # The first size of each named axis, which all later ones must equal; 1 is broadcast.
    seen: dict[str, tuple[str, int, int]] = {}
    for known, value in zip(inputs, values, strict=False):
        if known is None:
            continue
        if not isinstance(value, Tensor):
            if value is None or isinstance(value, str | bytes) or type(value).__module__ == "numpy":
                raise InputError(_no_tensor_message(known, value, part))
            continue
        if value.ndim != len(known.sizes):
            raise InputError(_other_axes_message(known, value, part))
        for axis, (size, found) in enumerate(zip(known.sizes, value.shape, strict=True)):
            if type(found) is not int:  # a symbol of torch.export, which traces the model at all sizes
                continue
            if isinstance(size, int):
                if found != size:
                    raise InputError(_other_size_message(known, axis, size, found, part))
            elif not part and found != 1 and seen.setdefault(size, (known.name, axis, found))[2] != found:
                raise InputError(_unequal_sizes_message(size, seen[size], (known.name, axis, found)))


def _no_tensor_message(known: ModelInput, value: Any, part: str) -> str:
    kind = "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")
    return (
        f"The input {known.name}{_of_part(part)} is {kind}, and the example had a tensor there, so the model cannot be "
        "run. Give a tensor: torch.as_tensor(...) makes one of an array."
    )


def _other_axes_message(known: ModelInput, value: Tensor, part: str) -> str:
    return (
        f"The input {known.name}{_of_part(part)} has {value.ndim} axes, {list(value.shape)}, and the example had "
        f"{len(known.sizes)}, so the captured graph cannot compute it. Give it the axes of the example."
    )


def _other_size_message(known: ModelInput, axis: int, size: int, found: int, part: str) -> str:
    named = f"{{{known.name!r}: {{{axis}: 'name'}}}}" if not part else "{input: {axis: 'name'}} for the model's input"
    batch = (
        f" If the axis is the batch, the model's code makes it a constant, as the plan says: give batches of {size} "
        "alone (drop_last=True in a DataLoader)."
    )
    return (
        f"The input {known.name}{_of_part(part)} has {found} at axis {axis}, and the model was prepared with {size}. "
        "The captured graph keeps the sizes of its example, so the result would be wrong. Free the axis with "
        f"dynamic_shapes={named} in prepare or quantize (config: quantization.dynamic_shapes), or give inputs of the "
        f"example's size.{batch if axis == 0 else ''}"
    )


def _unequal_sizes_message(axis_name: str, first: tuple[str, int, int], second: tuple[str, int, int]) -> str:
    return (
        f'The axes "{axis_name}" of one call must be equal, and {first[0]} has {first[2]} at axis {first[1]}, '
        f"{second[0]} {second[2]} at axis {second[1]}, so the result would be wrong. Make them equal, or prepare the "
        "model with dynamic_shapes that gives the axes different names."
    )


def _of_part(part: str) -> str:
    return f" of {part}" if part else ""
