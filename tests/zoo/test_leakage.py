"""Calibration images that are validation images are found, whatever wrapping or link hides it; others are not."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from halfeven.errors import ConfigError
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.leakage import check_apart
from halfeven.zoo.options import DataOptions

PIXELS, LABELS = torch.randn(20, 1, 4, 4), torch.zeros(20, dtype=torch.int64)


def tensors(start, stop):
    return TensorDataset(PIXELS[start:stop], LABELS[start:stop])


def parts(calibration, validation):
    return Datasets(train=tensors(0, 20), calibration=calibration, validation=validation, num_classes=1)


WHOLE, PLAIN = tensors(0, 20), [(PIXELS[i], 0) for i in range(20)]


@pytest.mark.parametrize(
    ("calibration", "validation", "count"),
    [
        (WHOLE, WHOLE, "20 of the 20"),
        (Subset(WHOLE, range(5)), Subset(WHOLE, range(4, 9)), "1 of the 5"),
        (Subset(Subset(WHOLE, range(10, 20)), [0, 1]), Subset(WHOLE, range(11)), "1 of the 2"),
        (tensors(0, 8), tensors(6, 20), "2 of the 8"),
        (PLAIN, PLAIN, "20 of the 20"),
        (Subset(PLAIN, [3, 4]), PLAIN, "2 of the 2"),
    ],
    ids=["same", "subsets", "nested subsets", "same memory", "same list", "part of a list"],
)
def test_shared_images_are_refused(calibration, validation, count):
    with pytest.raises(ConfigError, match=f"{count} calibration samples are validation samples too"):
        check_apart(parts(calibration, validation))


@pytest.mark.parametrize(
    ("calibration", "validation"),
    [
        (Subset(WHOLE, range(5)), Subset(WHOLE, range(5, 20))),
        (tensors(0, 8), tensors(8, 20)),
        (Subset(PLAIN, range(5)), Subset(PLAIN, range(5, 20))),
        (tensors(0, 8), TensorDataset(PIXELS[:8].clone(), LABELS[:8])),
    ],
    ids=["subsets", "one memory", "a list", "other memory"],
)
def test_images_apart_are_accepted(calibration, validation):
    check_apart(parts(calibration, validation))


def paint(folder, count):
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def link_whole(root):
    (root / "val").symlink_to(root / "train", target_is_directory=True)


def link_class(root):
    (root / "val").mkdir()
    (root / "val" / "cat").symlink_to(root / "train" / "cat", target_is_directory=True)


def link_file(root):
    paint(root / "val" / "cat", 2)
    (root / "val" / "cat" / "other_name.png").symlink_to(root / "train" / "cat" / "3.png")


def hard_link_file(root):
    paint(root / "val" / "cat", 2)
    os.link(root / "train" / "cat" / "3.png", root / "val" / "cat" / "other_name.png")


@pytest.mark.parametrize(
    ("link", "count"),
    [(link_whole, 6), (link_class, 6), (link_file, 1), (hard_link_file, 1)],
    ids=["folder", "class", "file", "hard link"],
)
def test_links_between_folders_are_seen_through(tmp_path, link, count):
    paint(tmp_path / "train" / "cat", 6)
    link(tmp_path)
    datasets = load_datasets(DataOptions(root=str(tmp_path), image_size=32, resize=40))
    with pytest.raises(ConfigError, match=f"{count} of the 6"):
        check_apart(datasets)


def test_folders_of_other_files_are_accepted(tmp_path):
    paint(tmp_path / "train" / "cat", 6)
    paint(tmp_path / "val" / "cat", 3)  # with names that train has too
    check_apart(load_datasets(DataOptions(root=str(tmp_path), image_size=32, resize=40)))


def test_digits_are_apart():
    check_apart(load_datasets(DataOptions(source="digits")))
