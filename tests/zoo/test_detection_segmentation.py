"""Pascal VOC and COCO, on made-up pictures: labels stay on what they label, and whatever is missing is named."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from halfeven.errors import ConfigError
from halfeven.zoo.checked_samples import with_checks
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.leakage import check_apart
from halfeven.zoo.options import DataOptions
from scenes import COLOURS, write_coco, write_voc

PLAIN = dict(image_size=64, workers=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc") / "data", train=6, val=3)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "data", train=6, val=3, empty=1)


def segmentation(voc, **changes):
    return load_datasets(DataOptions(**{"source": "voc_segmentation", "root": str(voc), **PLAIN, **changes}))


def detection(coco, **changes):
    return load_datasets(DataOptions(**{"source": "coco_detection", "root": str(coco), **PLAIN, **changes}))


def share_of_colour(image, inside, kind):
    """Share of pixels that have the colour of a class."""
    colour = torch.tensor(COLOURS[kind]).view(3, 1, 1) / 255
    return float(((image - colour).abs().amax(0) < 0.35)[inside].float().mean())


def test_masks_stay_on_what_they_label(voc):
    data = segmentation(voc)
    assert (len(data.train), len(data.validation), data.num_classes) == (6, 3, 21)
    for part in (data.train, data.calibration, data.validation):
        for image, mask in (part[index] for index in range(3)):
            assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
            assert (mask.shape, mask.dtype) == ((64, 64), torch.int64)
            assert type(image) is type(mask) is torch.Tensor
            for kind in set(mask.unique().tolist()) & {1, 2}:
                assert share_of_colour(image, mask == kind, kind) > 0.8


def test_what_is_not_part_of_the_picture_is_unlabelled(voc):
    """60 x 80 fit into the square as 48 x 64."""
    image, mask = segmentation(voc).validation[0]
    assert bool((mask[48:] == 255).all())
    assert bool((image[:, 48:] == 0).all())
    assert bool((mask[:48] < 255).all())
    stretched, mask = segmentation(voc, keep_aspect=False).validation[0]
    assert bool((mask < 255).all())
    assert stretched.shape == (3, 64, 64)


def test_boxes_stay_on_what_they_label(coco):
    for changes in ({}, {"keep_aspect": False}):
        data = detection(coco, **changes)
        assert data.num_classes == 3
        for part in (data.train, data.validation):
            for index in range(len(part)):
                image, target = part[index]
                assert image.shape == (3, 64, 64)
                assert type(target["boxes"]) is torch.Tensor
                for box, kind in zip(target["boxes"], target["labels"].tolist(), strict=True):
                    left, top, right, bottom = box.round().int().tolist()
                    middle = torch.zeros(64, 64, dtype=torch.bool)
                    y, x = min((top + bottom) // 2, 63), min((left + right) // 2, 63)
                    middle[y, x] = True
                    colours = {k: share_of_colour(image, middle, k) for k in COLOURS}
                    assert 1.0 in colours.values(), "there is a figure, this one or one that lies on it"
                    assert kind in COLOURS


def test_pictures_without_boxes_are_judged_and_not_learned_from(coco):
    data = detection(coco)
    assert (len(data.train), len(data.validation)) == (5, 3)
    _, target = data.validation[0]
    assert (target["boxes"].shape, target["labels"].shape) == ((0, 4), (0,))


def test_training_pictures_are_augmented_and_calibration_pictures_are_not(voc):
    data = segmentation(voc)
    torch.manual_seed(1)
    looks = [data.train[0][0] for _ in range(6)]
    assert any(not torch.equal(looks[0], look) for look in looks[1:])
    assert torch.equal(data.calibration[0][0], data.calibration[0][0])


def test_processes_that_are_not_forked_can_read_them(voc, coco):
    for data in (segmentation(voc), detection(coco)):
        for part in with_checks(data, "error", Path()).parts().values():
            again = pickle.loads(pickle.dumps(part))
            torch.manual_seed(0)
            image, _ = part[0]
            torch.manual_seed(0)
            assert torch.equal(again[0][0], image)


def test_calibrating_on_validation_pictures_is_found(voc, tmp_path):
    folder = tmp_path / "voc"
    shutil.copytree(voc, folder)
    lists = folder / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text((lists / "train.txt").read_text())
    with pytest.raises(ConfigError, match="6 of the 6 calibration samples are validation samples too"):
        check_apart(segmentation(folder))
    check_apart(segmentation(voc))


@pytest.mark.parametrize("source", ["voc_segmentation", "coco_detection"])
def test_a_folder_of_something_else(source, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root"):
        load_datasets(DataOptions(source=source, root=str(tmp_path), workers=0))


def test_classes_are_counted_with_the_background(coco, tmp_path):
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    for part in ("train", "val"):
        path = folder / "annotations" / f"instances_{part}2017.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 90, "name": "toothbrush"})
        path.write_text(json.dumps(content))
    assert detection(folder).num_classes == 91
