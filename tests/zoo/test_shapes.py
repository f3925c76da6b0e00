"""Made-up scenes: the same for a seed, with boxes that fit."""

import pickle

import numpy as np
import pytest
import torch

from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions
from halfeven.zoo.shapes import SHAPES, Shapes, scene

OPTIONS = DataOptions(source="shapes", image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_same_seed_and_index_give_the_same_scene():
    scenes, again = Shapes(20, 3, OPTIONS), pickle.loads(pickle.dumps(Shapes(20, 3, OPTIONS)))
    for index in (7, 0, 7):
        (image, target), (other, same) = scenes[index], again[index]
        assert torch.equal(image, other)
        assert all(torch.equal(target[name], same[name]) for name in ("boxes", "labels"))
    assert not torch.equal(scenes[1][0], scenes[2][0])
    assert not torch.equal(scenes[1][0], Shapes(20, 4, OPTIONS)[1][0])
    with pytest.raises(IndexError):
        scenes[20]


def test_boxes_enclose_shapes_and_do_not_touch():
    seen = set()
    for index in range(30):
        image, target = Shapes(30, 0, OPTIONS)[index]
        assert image.shape == (3, 64, 64)
        assert image.abs().max() <= 1
        boxes = target["boxes"]
        assert 1 <= len(boxes) == len(target["labels"])
        assert bool((boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 64).all() and (boxes[:, 2:] > boxes[:, :2]).all())
        for one, a in enumerate(boxes):
            for b in boxes[one + 1 :]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
        seen |= set(target["labels"].tolist())
    assert seen == set(range(1, len(SHAPES) + 1))


def test_a_shape_touches_all_sides_of_its_box():
    """Pixels that differ much from the background lie in the box, up to its sides."""
    pixels, boxes, _ = scene(np.random.default_rng(5), 96)
    background = np.median(pixels.reshape(-1, 3), 0)
    far = np.linalg.norm(pixels.astype(float) - background, axis=2) > 70
    for left, top, right, bottom in boxes.astype(int):
        inside = far[top:bottom, left:right]
        assert inside.any(0)[[0, -1]].all()
        assert inside.any(1)[[0, -1]].all()
        far[top:bottom, left:right] = False
    assert far.mean() < 0.001


def test_the_parts_of_the_data():
    data = load_datasets(OPTIONS)
    assert data.num_classes == 1 + len(SHAPES)
    assert len(data.train) > len(data.calibration) > len(data.validation) > 0
    assert not torch.equal(data.train[0][0], data.validation[0][0])
