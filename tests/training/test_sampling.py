"""The images of a run, their order and their augmentation are functions of the seed and the position alone."""

import random

import numpy as np
import pytest
import torch

from halfeven.errors import ConfigError
from halfeven.training import sampling
from halfeven.training.options import TrainingOptions
from halfeven.training.sampling import EpochBatches, SeededSamples, TrainingBatches, seeded
from processes import in_a_process


class Noisy:
    """Ten images of noise from all three generators, as augmentations draw it."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, float(torch.rand(())), random.random(), np.random.rand()]), index


def batches(epoch, start=0, *, workers=0, seed=0):
    loader = TrainingBatches(Noisy(), TrainingOptions(batch_size=3), seed=seed, workers=workers)
    return [images for images, _ in loader.epoch(epoch, start)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def batches_of_workers():
    return batches(1, workers=2)


def test_worker_processes_change_nothing():
    assert same(batches(1), in_a_process(batches_of_workers))


def test_a_started_epoch_goes_on_where_it_was():
    assert same(batches(1)[2:], batches(1, start=2))


def drawing_collate(items):
    """Makes a batch as collators do that mask words at random."""
    return torch.tensor([float(torch.rand(())), random.random(), np.random.rand()]), len(items)


def test_what_is_drawn_to_make_a_batch_depends_on_its_place():
    def drawn(epoch, start=0):
        torch.rand(1)
        options = TrainingOptions(batch_size=3)
        loader = TrainingBatches(Noisy(), options, seed=0, workers=0, collate=drawing_collate)
        return [numbers for numbers, _ in loader.epoch(epoch, start)]

    assert same(drawn(1)[2:], drawn(1, start=2))
    assert not same(drawn(1), drawn(2))


def test_epochs_and_seeds_differ():
    assert not same(batches(0), batches(1))
    assert not same(batches(0), batches(0, seed=1))


def test_an_image_is_augmented_anew_in_each_epoch():
    images = SeededSamples(Noisy(), seed=0)
    assert torch.equal(images[2, 5][0], images[2, 5][0])
    assert not torch.equal(images[2, 5][0][1:], images[3, 5][0][1:])


def test_the_generators_are_given_back():
    def draw():
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = [draw(), draw()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    found = [draw()]
    with seeded(1, 2, 3):
        draw()
    assert [*found, draw()] == expected


@pytest.mark.parametrize(
    ("length", "world", "batch", "drop_last"),
    [(10, 2, 3, False), (11, 2, 2, True), (23, 3, 2, False), (5, 4, 1, False)],
)
def test_processes_share_an_epoch(monkeypatch, length, world, batch, drop_last):
    monkeypatch.setattr(sampling, "world_size", lambda: world)
    shares = []
    for number in range(world):
        monkeypatch.setattr(sampling, "rank", lambda number=number: number)
        sampler = EpochBatches(length, batch, seed=0, drop_last=drop_last)
        shares.append([index for indices in sampler for _, index in indices])
    assert len({len(share) for share in shares}) == 1, "all processes take equally many images"
    seen = {index for share in shares for index in share}
    if not drop_last:
        assert seen == set(range(length)), "every image is seen"
    assert sum(map(len, shares)) - len(seen) < world, "only what fills up the last round is seen twice"


def test_too_few_images():
    with pytest.raises(ConfigError, match="do not fill one batch of 8"):
        EpochBatches(5, 8, seed=0, drop_last=True)


def test_single_image_batch():
    with pytest.raises(ConfigError, match="would have one sample"):
        EpochBatches(9, 4, seed=0, drop_last=False)
