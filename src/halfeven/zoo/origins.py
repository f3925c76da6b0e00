"""Find where samples come from, so that the same sample is recognised in two data sets."""

import os
from collections.abc import Hashable, Iterator
from typing import Any

from torch.utils.data import Dataset, Subset, TensorDataset


class Wrapped(Dataset[Any]):
    """Samples that pass through another data set unchanged in number and order."""

    samples: Any


def parent(samples: Any, index: int) -> tuple[Any, int]:
    """Return the data set that a sample is from, and its index there."""
    while isinstance(samples, Subset | Wrapped):
        index = samples.indices[index] if isinstance(samples, Subset) else index
        samples = samples.dataset if isinstance(samples, Subset) else samples.samples
    return samples, index


def origins(samples: Any) -> Iterator[Hashable]:
    """Return the origin of each sample of a data set; samples that are one and the same have equal origins.

    Samples are the same if they are the same item of one data set (also through subsets of it), the same place in one
    tensor's memory, or the same file, whatever links lead to it. Copies are not recognised.
    """
    for index in range(len(samples)):
        yield _sample_origin(samples, index)


def _sample_origin(samples: Any, index: int) -> Hashable:
    samples, index = parent(samples, index)
    if isinstance(samples, TensorDataset):
        first = samples.tensors[0]
        return "memory", first.data_ptr() + index * first.stride(0) * first.element_size()
    files = getattr(samples, "samples", None)  # torchvision's folders: pairs of path and label
    if isinstance(files, list) and len(files) == len(samples) and isinstance(files[index][0], str):
        found = os.stat(files[index][0])  # follows links; a hard link has the number of its file
        return "file", found.st_dev, found.st_ino
    return "item", id(samples), index
