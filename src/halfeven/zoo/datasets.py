"""Labelled data: digits, Fashion-MNIST, folders of images, Pascal VOC, COCO, made-up scenes, texts, or your function's.

Each source gives samples for training, for calibration and for validation. Calibration samples are a seeded draw of the
training samples, preprocessed as in evaluation.
"""

import dataclasses
import gzip
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from halfeven.errors import ConfigError
from halfeven.imports import call_function, extra, users_code
from halfeven.nearest import did_you_mean_path
from halfeven.renamed import renamed_attributes
from halfeven.zoo import detection_segmentation
from halfeven.zoo.holdout import hold_out
from halfeven.zoo.images import read_image
from halfeven.zoo.options import DataOptions
from halfeven.zoo.parts import Datasets as Datasets
from halfeven.zoo.parts import calibration_subset
from halfeven.zoo.shapes import SHAPES, TRAINING, VALIDATION, Shapes
from halfeven.zoo.text import texts

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
"""Folder of the files of Debian's package dataset-fashion-mnist."""
# Means and standard deviations of the pixels, from 0 to 1, as the model sees them.
FASHION_MNIST_MEAN = 0.2860
FASHION_MNIST_STD = 0.3530
DIGITS_MEAN = 0.3053
DIGITS_STD = 0.3236
DIGITS_VALIDATION = 360
"""Number of the 1,797 digits that are kept for validation."""


def load_datasets(options: DataOptions) -> Datasets:
    """Open the data that the options name.

    Raises:
        ConfigError: the data is not where the options say, or is other data.
    """
    loaders: dict[str, Callable[[DataOptions], Datasets]] = {
        "digits": digits,
        "fashion_mnist": fashion_mnist,
        "image_folder": image_folder,
        "voc_segmentation": _voc_datasets,
        "coco_detection": _coco_datasets,
        "shapes": _shapes_datasets,
        "texts": _text_datasets,
        "callable": _from_callable,
    }
    with users_code(f'The data of data.source="{options.source}"'):
        datasets = loaders[options.source](options)
    for part, samples in datasets.parts().items():
        if len(samples) == 0:
            raise ConfigError(
                f'The {part} part of the data is empty (data.source="{options.source}"), so there is nothing to use '
                "for it. Add samples to that part."
            )
    return (
        hold_out(datasets, options) if options.selection == "holdout" else dataclasses.replace(datasets, holdout=None)
    )


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Return all images of the digits, enlarged, and their labels."""
    with extra("train", 'data.source="digits"'):
        from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return (images - DIGITS_MEAN) / DIGITS_STD, torch.tensor(data.target, dtype=torch.int64)


def digits(options: DataOptions) -> Datasets:
    """Open scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged to 32x32."""
    images, labels = _digits()
    # A fixed seed: every run validates on the same images, whatever the seeds of the options.
    order = torch.tensor(np.random.default_rng(0).permutation(len(labels)))
    validation = order[:DIGITS_VALIDATION]
    train = order[DIGITS_VALIDATION:]
    train_images: Dataset[tuple[Tensor, ...]] = TensorDataset(images[train], labels[train])
    return Datasets(
        train=train_images,  # type: ignore[arg-type]
        train_as_evaluated=train_images,  # type: ignore[arg-type]
        calibration=calibration_subset(train_images, options),  # type: ignore[arg-type]
        validation=TensorDataset(images[validation], labels[validation]),
        num_classes=10,
    )


def fashion_mnist(options: DataOptions) -> Datasets:
    """Open Zalando's 70,000 grey images of clothes, padded from 28x28 to 32x32 pixels."""
    root = Path(FASHION_MNIST_ROOT if options.root == "auto" else options.root)
    parts = {}
    for part, stem, count in (("train", "train", 60000), ("validation", "t10k", 10000)):
        pixels = read_idx(root / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(root / f"{stem}-labels-idx1-ubyte.gz")
        if pixels.shape != (count, 28, 28) or labels.shape != (count,):
            raise ConfigError(
                f"The {stem} files in {root} have images of shape {pixels.shape} and labels of shape {labels.shape}; "
                f"Fashion-MNIST has {count} of 28x28. Another data set under these names would be misread. Set "
                "data.root to Fashion-MNIST's folder."
            )
        images = F.pad(torch.from_numpy(pixels).unsqueeze(1).float() / 255, (2, 2, 2, 2))
        images = (images - FASHION_MNIST_MEAN) / FASHION_MNIST_STD
        parts[part] = TensorDataset(images, torch.from_numpy(labels).long())
    train = parts["train"]
    return Datasets(
        train=train,
        train_as_evaluated=train,
        calibration=calibration_subset(train, options),
        validation=parts["validation"],
        num_classes=10,
    )


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a gzipped IDX file of unsigned bytes: two zeros, type 8, number of axes, big-endian sizes, the bytes.

    Raises:
        ConfigError: the file is missing, damaged or of another type.
    """
    if not path.is_file():
        raise ConfigError(
            f"There is no file {path}, so Fashion-MNIST cannot be read. Install Debian's package dataset-fashion-mnist "
            "(apt-get install dataset-fashion-mnist), or set data.root to the folder of the four .gz files."
        )
    try:
        content = gzip.decompress(path.read_bytes())
        zero, kind, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ConfigError(
            f"The file {path} is not a whole IDX file ({error}), so its images cannot be read. Download it again."
        ) from error
    if (zero, kind) != (0, 8):
        raise ConfigError(
            f"The file {path} is not an IDX file of bytes (it starts with {zero}, {kind}), so its images cannot be "
            "read. Download it again."
        )
    return values


def image_folder(options: DataOptions) -> Datasets:
    """Open images in ImageNet's layout, root/train and root/val with a folder per class, with its preprocessing."""
    with extra("train", 'data.source="image_folder"'):
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import InterpolationMode

    root = Path(options.root)
    usual = "Set data.root to a folder with train/CLASS/IMAGE and val/CLASS/IMAGE (ImageNet as usually unpacked)."
    if options.root == "auto":
        raise ConfigError(f"data.root is not set, so there are no images. {usual}")
    for folder in (root / "train", root / "val"):
        if not folder.is_dir():
            raise ConfigError(
                f"There is no folder {folder}, so there are no images.{did_you_mean_path(folder)} {usual}"
            )
    finish = [transforms.ToTensor(), transforms.Normalize(options.mean, options.std)]
    bilinear = InterpolationMode.BILINEAR
    # ImageNet's usual crops: at random in training, from the centre of the resized image in evaluation.
    crop = transforms.RandomResizedCrop(options.image_size, interpolation=bilinear, antialias=True)
    training = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *finish])
    scale = transforms.Resize(options.resize, interpolation=bilinear, antialias=True)
    evaluation = transforms.Compose([scale, transforms.CenterCrop(options.image_size), *finish])

    def open_folder(name: str, transform: Any) -> Any:
        try:
            return ImageFolder(root / name, transform=transform, loader=read_image)
        except FileNotFoundError as error:
            raise ConfigError(
                f"The images in {root / name} cannot be used: {str(error).rstrip('. ')}. Put a folder with at least "
                "one image there for each class, and remove empty folders."
            ) from error

    train = open_folder("train", training)
    # The same images once more, for calibration and held-out samples.
    seen_as_in_evaluation = open_folder("train", evaluation)
    validation = open_folder("val", evaluation)
    if train.classes != validation.classes:
        odd = sorted(set(train.classes) ^ set(validation.classes))
        raise ConfigError(
            f"The class folders of {root / 'train'} and {root / 'val'} differ ({', '.join(odd[:6])}), so their labels "
            "would not mean the same. Put the same class folders in both."
        )
    return Datasets(
        train=train,
        train_as_evaluated=seen_as_in_evaluation,
        calibration=calibration_subset(seen_as_in_evaluation, options),
        validation=validation,
        num_classes=len(train.classes),
    )


def _voc_datasets(options: DataOptions) -> Datasets:
    train, plain, validation = detection_segmentation.voc_segmentation(options)
    return Datasets(
        train=train,
        train_as_evaluated=plain,
        calibration=calibration_subset(plain, options),
        validation=validation,
        num_classes=detection_segmentation.VOC_CLASSES,
    )


def _coco_datasets(options: DataOptions) -> Datasets:
    train, plain, validation = detection_segmentation.coco_detection(options)
    highest = max(train.items.coco.getCatIds())
    return Datasets(
        train=train,
        train_as_evaluated=plain,
        calibration=calibration_subset(plain, options),
        validation=validation,
        num_classes=highest + 1,
    )


def _shapes_datasets(options: DataOptions) -> Datasets:
    train = Shapes(TRAINING, 0, options)
    return Datasets(
        train=train,
        train_as_evaluated=train,
        calibration=calibration_subset(train, options),
        validation=Shapes(VALIDATION, 1, options),
        num_classes=1 + len(SHAPES),
    )


def _text_datasets(options: DataOptions) -> Datasets:
    train, validation, classes = texts(options)
    return Datasets(
        train=train,
        train_as_evaluated=train,
        calibration=calibration_subset(train, options),
        validation=validation,
        num_classes=len(classes),
    )


def _from_callable(options: DataOptions) -> Datasets:
    datasets = call_function(options.function, "data.function", options)
    if not isinstance(datasets, Datasets):
        raise ConfigError(
            f"{options.function} returned a {type(datasets).__name__}, so it is not known which samples to train and "
            "validate on. It must return a halfeven.zoo.datasets.Datasets."
        )
    return datasets


__getattr__ = renamed_attributes(__name__, Images="zoo.parts.Samples")
