"""Notice single samples that were given in the place of batches, and say how to make batches of them."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from halfeven.errors import CalibrationError
from halfeven.graph.restoring import same_random_numbers, state_restored
from halfeven.graph.torch_private import pytree

MAKE_BATCHES = (
    "torch.utils.data.DataLoader(dataset, batch_size=32) makes batches of a data set, and x[None] of a sample x"
)


def check_gives_batches(loader: Any, first: Any, name: str) -> None:
    """Refuse a data set of torch whose entries are single samples: a model may take channels for samples then.

    Args:
        loader: given by the user.
        first: its first entry.
        name: the argument that the loader was given as, for the message.

    Raises:
        CalibrationError: the loader is a data set, and the label of its first entry is a number.
    """
    if isinstance(loader, Dataset) and any(_is_number(label) for label in _labels(first)):
        raise CalibrationError(
            f"The argument {name} is a data set ({type(loader).__name__}) whose entries are single samples, since the "
            "label of the first is a number. The model takes batches, and would take another axis for the samples. "
            f"{MAKE_BATCHES}."
        )


def _labels(entry: Any) -> list[Any]:
    if isinstance(entry, Mapping):
        return [value for key, value in entry.items() if "label" in str(key) or "target" in str(key)]
    several = isinstance(entry, Sequence) and not isinstance(entry, str | bytes)
    return list(entry[1:2]) if several else []


def _is_number(label: Any) -> bool:
    return isinstance(label, numbers.Number) or (isinstance(label, Tensor) and label.ndim == 0)


def batch_axis_hint(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Return a sentence for a model that runs once its inputs have an axis for the batch, with a space before it.

    It is "" where the model does not run with the axis either.
    """
    added = pytree.tree_map_only(Tensor, lambda x: x[None], (args, kwargs))
    try:
        with torch.no_grad(), state_restored(model), same_random_numbers():
            model(*added[0], **added[1])
    except Exception:  # the model's own code raises what it likes
        return ""
    return f" The model runs if a batch axis stands before those of the input: {MAKE_BATCHES}."
