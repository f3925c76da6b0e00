"""A store of tensors with a bound on memory: RAM first, then files."""

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CalibrationError
from halfeven.files import storing
from halfeven.graph.torch_private import pytree
from halfeven.layerwise.batches import read_inputs
from halfeven.temporary import TemporaryFolder


class Stored:
    """A value in a `BoundedCache`: in RAM, or in a file that is deleted with this object."""

    def __init__(self, value: Any, file: Path | None) -> None:
        self._value = None if file else value
        self._file = file

    def load(self) -> Any:
        """Return the value; a value on disk is read at each call."""
        return torch.load(self._file, weights_only=True) if self._file else self._value


class BoundedCache:
    """Holds values in RAM up to a bound, and in files of a temporary folder beyond it.

    A value lives as long as the `Stored` object that `store` returned for it.

    Args:
        memory: largest number of bytes in RAM.
        folder: parent of the temporary folder; "auto" for the system's default.
    """

    def __init__(self, memory: float, folder: str = "auto") -> None:
        self.memory = memory
        self.used = 0
        self.on_disk = 0
        self.files = 0
        self._parent = None if folder == "auto" else folder
        self._folder: TemporaryFolder | None = None

    def store(self, value: Any) -> Stored:
        """Store a value: any nesting of lists, tuples and dicts of tensors and numbers."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        fits = self.used + size <= self.memory
        stored = Stored(value, None if fits else self._write(value))
        # By reference count: when the caller drops a value, its RAM counts as free or its file goes, without a call.
        weakref.finalize(stored, self._release, size if fits else 0, stored._file)
        self.used += size if fits else 0
        self.on_disk += 0 if fits else size
        return stored

    def _write(self, value: Any) -> Path:
        if self._folder is None:
            self._folder = TemporaryFolder(self._parent)
            # Also at the interpreter's exit, so that an interrupted run leaves no folder.
            weakref.finalize(self, self._folder.delete)
        self.files += 1
        path = self._folder.path / f"{self.files}.pt"
        # Without the copy, torch.save would write the whole storage that a view belongs to.
        with storing(path):
            torch.save(pytree.tree_map_only(Tensor, torch.clone, value), path)
        return path

    def _release(self, size: int, file: Path | None) -> None:
        self.used -= size
        if file is not None:
            file.unlink(missing_ok=True)


def store_inputs(
    model: nn.Module, loader: Iterable[Any], size: int, cache: BoundedCache, batches: int | None = None
) -> list[Stored]:
    """Cut the batches of a loader into batches of `size` samples and store the model's arguments, (args, kwargs).

    The remainder of a batch, and batches of fewer samples, stay as they are.

    Args:
        model: the model, whose example says which entries of a batch are inputs.
        loader: batches as for `halfeven.calibrate`.
        size: samples of a stored batch.
        cache: receives the arguments.
        batches: largest number of the loader's batches to read; None: all.

    Raises:
        CalibrationError: the loader is empty.
    """
    result: list[Stored] = []
    for inputs in read_inputs(model, loader, batches):
        leaves, spec = pytree.tree_flatten(inputs)
        # Scalars and tensors of another first size, such as a position table, are not cut.
        samples = max((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), default=1)
        for start in range(0, samples, size):
            part = [_samples_of(leaf, samples, slice(start, start + size)) for leaf in leaves]
            result.append(cache.store(pytree.tree_unflatten(part, spec)))
    if not result:
        raise CalibrationError(
            "The loader gave no batch, so there is nothing to compare the quantized model with the float model on. "
            "Give a loader with at least one batch; an iterator that was used up before looks empty."
        )
    return result


def _samples_of(leaf: Any, samples: int, part: slice) -> Any:
    is_batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == samples
    return leaf[part] if is_batched else leaf
