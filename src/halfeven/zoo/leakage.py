"""Whether calibration images are validation images: an accuracy measured on them would be too good to be true."""

import os
from collections.abc import Hashable, Iterator
from typing import Any

from torch.utils.data import Subset, TensorDataset

from halfeven.errors import ConfigError
from halfeven.zoo.datasets import Datasets


def check_apart(datasets: Datasets) -> None:
    """Refuse calibration images that are also validation images.

    Images are the same if they are the same item of one data set (also through subsets of it), the same place in one
    tensor's memory, or the same file, whatever links lead to it. Copies are not recognised.

    Raises:
        ConfigError: some are.
    """
    calibration = list(origins(datasets.calibration))
    shared = set(calibration) & set(origins(datasets.validation))
    if shared:
        count = sum(origin in shared for origin in calibration)
        raise ConfigError(
            f"{count} of the {len(calibration)} calibration images are validation images too. The "
            "model would be fitted to the images that its accuracy is measured on, which would then say nothing of "
            "others. Calibrate on training images: give data.root a train folder with images of its own, or let your "
            "data.function return other images as `calibration`."
        )


def origins(images: Any) -> Iterator[Hashable]:
    """Where each image of a data set comes from: equal for images that are one and the same."""
    for index in range(len(images)):
        yield _origin(images, index)


def _origin(images: Any, index: int) -> Hashable:
    while isinstance(images, Subset):
        images, index = images.dataset, images.indices[index]
    if isinstance(images, TensorDataset):
        first = images.tensors[0]
        return "memory", first.data_ptr() + index * first.stride(0) * first.element_size()
    files = getattr(images, "samples", None)  # torchvision's folders: pairs of path and label
    if isinstance(files, list) and len(files) == len(images) and isinstance(files[index][0], str):
        found = os.stat(files[index][0])  # follows links; a hard link has the number of its file
        return "file", found.st_dev, found.st_ino
    return "item", id(images), index
