"""The inputs of a call of a deployed file: by position, by name, or in the lists and dicts that the model takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfeven.deployment.exported_program import example_of
from halfeven.errors import VerificationError
from halfeven.graph.batches import argument_names, in_order_of
from halfeven.graph.torch_private import pytree


def model_arguments(qmodel: nn.Module, input_names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a model that hold tensors, by name, with the example's value of each.

    Args:
        qmodel: the model.
        input_names: names of its file's inputs, which positional arguments have there if all of them are tensors.
    """
    args, kwargs = example_of(qmodel)
    named = zip(argument_names(qmodel, len(args)), args, strict=True)
    positional = {name: value for name, value in named if _holds_tensors(value)}
    if all(isinstance(value, Tensor) for value in positional.values()):
        positional = dict(zip(input_names, positional.values(), strict=False))
    # Keyword inputs come last in the file.
    return positional | {name: value for name, value in kwargs.items() if _holds_tensors(value)}


def tensors_in_order(
    inputs: Sequence[Any], named: Mapping[str, Any], taken: Mapping[str, Any], path: str | Path
) -> list[Tensor]:
    """Return the tensors of positional and named inputs in the file's order.

    Args:
        inputs: those by position.
        named: those by name; None stands for none.
        taken: the inputs that there are, by name, each with an example of its value; None: a tensor.
        path: the file, for messages.

    Raises:
        VerificationError: an input is missing, has another name or form, or is no tensor.
    """
    named = {name: value for name, value in named.items() if value is not None}
    names = list(taken)
    left = names[len(inputs) :]
    if len(inputs) > len(names) or set(named) != set(left):
        given = ", ".join([f"{len(inputs)} by position", *named])
        raise VerificationError(
            f"{path} takes the inputs {', '.join(names)}, and was given {given}, so it cannot be run. Give each input "
            "once, by position or by name."
        )
    values = [*inputs, *(named[name] for name in left)]
    return [
        tensor
        for (name, like), value in zip(taken.items(), values, strict=True)
        for tensor in _tensors_of_one(name, value, like, path)
    ]


def _tensors_of_one(name: str, value: Any, like: Any, path: str | Path) -> list[Tensor]:
    nested = like is not None and not isinstance(like, Tensor)
    wanted = pytree.tree_leaves(like) if nested else [like]
    found = pytree.tree_leaves(in_order_of(value, like)) if nested else [value]
    if len(found) != len(wanted):
        raise VerificationError(
            f'The input "{name}" of {path} holds {len(found)} values, and the example that the model was prepared with '
            f"{len(wanted)}, so it cannot be run. Give it in the example's form."
        )
    # What else the example holds, such as a switch, is a constant of the file.
    tensors = [one for one, like_one in zip(found, wanted, strict=True) if not nested or isinstance(like_one, Tensor)]
    for one in tensors:
        if not isinstance(one, Tensor):
            raise VerificationError(
                f'The input "{name}" of {path} is a {type(one).__name__}, which cannot be run. Give a tensor: '
                "torch.as_tensor(...) makes one."
            )
    return tensors


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
