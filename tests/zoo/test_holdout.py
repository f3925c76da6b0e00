"""Held-out samples are a seeded part of training that is neither trained nor calibrated on."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from halfeven.errors import ConfigError
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.options import DataOptions
from halfeven.zoo.origins import origins


def split(data):
    """The origins of the samples of each part."""
    return {name: set(origins(samples)) for name, samples in data.parts().items()}


def check_apart(data, whole):
    parts = split(data)
    assert not parts["holdout"] & (parts["train"] | parts["calibration"] | parts["validation"])
    assert parts["holdout"] | parts["train"] == set(origins(whole.train))
    assert data.selection is data.holdout


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_held_out_share_is_apart_and_the_same_each_time(share):
    def loaded(**options):
        return load_datasets(DataOptions(source="digits", calibration_samples=1000, **options))

    data = loaded(selection="holdout", holdout_share=share)
    again = loaded(selection="holdout", holdout_share=share)
    check_apart(data, Datasets(train=data.train.dataset, calibration=(), validation=(), num_classes=10))
    assert len(data.holdout) == round(share * 1437)
    assert len(data.calibration) == min(1000, 1437 - len(data.holdout)), "the rest of training fills it up"
    assert data.holdout.indices == again.holdout.indices
    other = loaded(selection="holdout", holdout_share=share, holdout_seed=1)
    assert data.holdout.indices != other.holdout.indices
    plain = loaded()
    assert plain.holdout is None
    assert plain.selection is plain.validation


def test_images_that_are_held_out_are_seen_as_in_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
                    tmp_path / part / name / f"{i}.png"
                )
    options = DataOptions(
        root=str(tmp_path), image_size=16, resize=18, calibration_samples=5, selection="holdout", holdout_share=0.25
    )
    data = load_datasets(options)
    check_apart(data, Datasets(train=data.train.dataset, calibration=(), validation=(), num_classes=2))
    assert torch.equal(data.holdout[0][0], data.holdout[0][0])
    assert not torch.equal(data.train[0][0], data.train[0][0]), "training images are cropped at random"
    assert (len(data.holdout), len(data.calibration)) == (4, 5)


SAMPLES = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) % 2)


def own(options):
    return Datasets(
        train=Subset(SAMPLES, range(30)),
        calibration=Subset(SAMPLES, range(10)),
        validation=Subset(SAMPLES, range(30, 40)),
        num_classes=2,
    )


def with_other_order(options):
    return Datasets(
        train=SAMPLES, train_as_evaluated=Subset(SAMPLES, range(5)), calibration=SAMPLES, validation=SAMPLES,
        num_classes=2,
    )  # fmt: skip


def with_its_own(options):
    return Datasets(
        train=Subset(SAMPLES, range(20)),
        calibration=Subset(SAMPLES, range(10)),
        validation=Subset(SAMPLES, range(30, 40)),
        holdout=Subset(SAMPLES, range(20, 30)),
        num_classes=2,
    )


def of(function, **options):
    return DataOptions(source="callable", function=f"{__name__}:{function.__name__}", selection="holdout", **options)


def test_of_a_users_own_function():
    data = load_datasets(of(own, holdout_share=0.4))
    check_apart(data, own(None))
    assert 0 < len(data.calibration) < 10, "what is held out of training is no calibration sample any more"
    assert [int(data.holdout[i][0]) for i in range(12)] == data.holdout.indices


def test_a_function_may_bring_its_own():
    assert len(load_datasets(of(with_its_own)).holdout) == 10
    plain = DataOptions(source="callable", function=f"{__name__}:with_its_own")
    assert load_datasets(plain).holdout is None


def test_what_cannot_be_held_out_is_refused():
    with pytest.raises(ConfigError, match="train has 40 samples and train_as_evaluated has 5"):
        load_datasets(of(with_other_order))
    with pytest.raises(ConfigError, match="leaves none to train on"):
        load_datasets(of(own, holdout_share=0.99))
    with pytest.raises(ConfigError, match="no effect with data"):
        DataOptions(holdout_share=0.2)
