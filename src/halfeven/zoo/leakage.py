"""Keep calibration and validation apart: an accuracy measured on calibration samples would be too good to be true."""

import os
from collections.abc import Hashable, Iterator
from typing import Any

from torch.utils.data import TensorDataset

from halfeven.errors import ConfigError
from halfeven.zoo.checked_samples import parent
from halfeven.zoo.datasets import Datasets


def check_apart(datasets: Datasets) -> None:
    """Refuse calibration samples that are also validation samples.

    Samples are the same if they are the same item of one data set (also through subsets of it), the same place in one
    tensor's memory, or the same file, whatever links lead to it. Copies are not recognised.

    Raises:
        ConfigError: a sample is in both parts.
    """
    calibration = list(origins(datasets.calibration))
    shared = set(calibration) & set(origins(datasets.validation))
    if shared:
        count = sum(origin in shared for origin in calibration)
        raise ConfigError(
            f"{count} of the {len(calibration)} calibration samples are validation samples too. The model would be "
            "fitted to the samples that its accuracy is measured on, and the accuracy would say nothing about others. "
            "Calibrate on training samples: give data.root a train folder with files of its own, or let your "
            "data.function return other samples as `calibration`."
        )


def origins(samples: Any) -> Iterator[Hashable]:
    """Return the origin of each sample of a data set; samples that are one and the same have equal origins."""
    for index in range(len(samples)):
        yield _origin(samples, index)


def _origin(samples: Any, index: int) -> Hashable:
    samples, index = parent(samples, index)
    if isinstance(samples, TensorDataset):
        first = samples.tensors[0]
        return "memory", first.data_ptr() + index * first.stride(0) * first.element_size()
    files = getattr(samples, "samples", None)  # torchvision's folders: pairs of path and label
    if isinstance(files, list) and len(files) == len(samples) and isinstance(files[index][0], str):
        found = os.stat(files[index][0])  # follows links; a hard link has the number of its file
        return "file", found.st_dev, found.st_ino
    return "item", id(samples), index
