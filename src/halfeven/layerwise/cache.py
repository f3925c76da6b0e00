"""A cache of activations with a bound on memory: RAM first, then files."""

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from halfeven.errors import CalibrationError
from halfeven.graph.capture import inputs_of


class Stored:
    """A value in a cache: in RAM, or in a file that goes with it."""

    def __init__(self, value: Any, file: Path | None) -> None:
        self._value = None if file else value
        self._file = file

    def load(self) -> Any:
        """The value; one on disk is read anew each time."""
        return torch.load(self._file, weights_only=True) if self._file else self._value


class Cache:
    """Holds values in RAM up to a bound, and beyond it in files of a temporary folder.

    A value lives as long as the `Stored` that stands for it.

    Args:
        memory: bytes that may lie in RAM.
        folder: where the temporary folder is made; "auto" for the system's place.
    """

    def __init__(self, memory: float, folder: str = "auto") -> None:
        self.memory, self.used, self.on_disk, self.files = memory, 0, 0, 0
        self._parent = None if folder == "auto" else folder
        self._folder: Path | None = None

    def store(self, value: Any) -> Stored:
        """Take a value: any nesting of lists, tuples and dicts of tensors and numbers."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        fits = self.used + size <= self.memory
        stored = Stored(value, None if fits else self._write(value))
        weakref.finalize(stored, self._release, size if fits else 0, stored._file)
        self.used += size if fits else 0
        self.on_disk += 0 if fits else size
        return stored

    def _write(self, value: Any) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="halfeven-", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.files += 1
        path = self._folder / f"{self.files}.pt"
        torch.save(pytree.tree_map_only(Tensor, torch.clone, value), path)  # a view would write all that it views
        return path

    def _release(self, size: int, file: Path | None) -> None:
        self.used -= size
        if file is not None:
            file.unlink(missing_ok=True)


def store_inputs(loader: Iterable[Any], size: int, cache: Cache, batches: int | None = None) -> list[Stored]:
    """The model's arguments, (args, kwargs), for batches of `size` samples cut from those of a loader.

    A remainder, and batches of the loader that are smaller, stay as they are.

    Args:
        batches: how many of the loader's batches to take; None: all.

    Raises:
        CalibrationError: the loader gave nothing.
    """
    result: list[Stored] = []
    for batch in islice(loader, batches):
        leaves, spec = pytree.tree_flatten(inputs_of(batch))
        samples = max((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), default=1)
        for start in range(0, samples, size):
            part = [_part(leaf, samples, slice(start, start + size)) for leaf in leaves]
            result.append(cache.store(pytree.tree_unflatten(part, spec)))
    if not result:
        raise CalibrationError(
            "The loader gave no batch, so there is nothing to compare the quantized model with the float one on. Give "
            "a loader with at least one batch; an iterator that was used up before looks empty."
        )
    return result


def _part(leaf: Any, samples: int, part: slice) -> Any:
    is_batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == samples
    return leaf[part] if is_batched else leaf
