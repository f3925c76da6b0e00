"""A bad image or label is one error with its file, index and label, or is left out and counted."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from halfeven.tasks import Classification, Segmentation
from halfeven.zoo.checked_samples import (
    SKIPPED_FILE,
    CheckedSamples,
    SampleError,
    check_targets,
    count_skipped,
    with_checks,
)
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.images import read_image
from halfeven.zoo.options import DataOptions
from integration.running import halfeven
from processes import in_a_process

from .bad_images import DAMAGES, truncate


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            place = tmp_path / "data" / part / label
            place.mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "data"


def opened(folder, on_bad="error", work=None):
    data = load_datasets(DataOptions(root=str(folder), image_size=16, resize=18, calibration_samples=3))
    found = with_checks(data, on_bad, work or folder)
    check_targets(found, Classification(2).wrong_target, one_size=True)
    return found


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_image_is_named(folder, damage):
    data = opened(folder)
    path = folder / "train" / "dog" / "1.png"
    DAMAGES[damage](path)
    with pytest.raises(SampleError, match=rf"train sample 4 \(file .*{path.name}, label 1\) cannot be used: \w+"):
        data.train[4]
    assert torch.is_tensor(data.train[3][0])


def refusal_in_a_worker_process(folder):
    data = opened(folder)
    truncate(folder / "val" / "cat" / "2.png")
    with pytest.raises(SampleError) as refusal:
        list(DataLoader(data.validation, batch_size=2, num_workers=1))
    return str(refusal.value)


def test_the_name_survives_worker_processes(folder):
    message = in_a_process(refusal_in_a_worker_process, folder)
    assert message.startswith("The validation sample 2 (file ")
    assert "Traceback" not in message


def test_the_first_image_is_looked_at_before_training(folder):
    truncate(folder / "train" / "cat" / "0.png")
    with pytest.raises(SampleError, match="train sample 0"):
        opened(folder)


def parts(samples):
    return Datasets(train=samples, calibration=samples, validation=samples, num_classes=3)


IMAGES = torch.zeros(6, 1, 4, 4)


@pytest.mark.parametrize("label", [3, 10, -1, -100, 0.5, float("nan")])
@pytest.mark.parametrize("through", ["tensors", "a subset", "items"])
def test_wrong_labels_are_found_before_training(tmp_path, label, through):
    labels = torch.tensor([0, 1, 2, 0, label, 1])
    samples = TensorDataset(IMAGES, labels)
    if through == "a subset":
        samples = Subset(samples, [5, 4, 3])
    if through == "items":
        samples = [(image, target) for image, target in zip(IMAGES, labels, strict=True)]
    data = with_checks(parts(samples), "error", tmp_path)
    where = 1 if through == "a subset" else 4
    # Labels of integers, beside a float, are floats too: the first is refused.
    where = 0 if labels.is_floating_point() else where
    with pytest.raises(SampleError, match=rf"train sample {where} .*label is"):
        read(data, where)


def read(data, index):
    check_targets(data, Classification(3).wrong_target, one_size=True)
    return data.train[index]


class SoftLabels(Classification):
    def loss(self, outputs, targets, label_smoothing=0.0):
        return (outputs - targets).square().mean()


def test_labels_that_a_task_can_use():
    task = Classification(3)
    for right in (
        0,
        2,
        np.int64(1),
        torch.tensor(2),
        torch.tensor(1, dtype=torch.uint8),
        torch.tensor([0.2, 0.5, 0.3]),
    ):
        assert task.wrong_target(right) == ""
    assert SoftLabels(3).wrong_target(0.5) == ""
    mask = torch.tensor([[0, 1], [2, 255]])
    assert Segmentation(3).wrong_target(mask) == ""
    assert "class 2" in Segmentation(2).wrong_target(mask)


@pytest.mark.parametrize("odd", [torch.zeros(1, 5, 4), torch.zeros(3, 4, 4), torch.zeros(1, 4, 4).double()])
def test_an_image_of_another_size_or_dtype(tmp_path, odd):
    data = with_checks(parts([*((image, 0) for image in IMAGES), (odd, 1)]), "error", tmp_path)
    check_targets(data, Classification(3).wrong_target, one_size=True)
    with pytest.raises(SampleError, match=r"sample 6 cannot be used: it is torch.*first sample is torch.float32"):
        data.train[6]
    check_targets(data, Classification(3).wrong_target, one_size=False)
    assert data.train[6][0] is odd


def test_samples_that_are_no_pairs(tmp_path):
    with pytest.raises(SampleError, match="pair of input and target"):
        CheckedSamples([torch.zeros(3)], "train", "error", tmp_path)[0]


def test_bad_samples_are_left_out_and_counted(folder, tmp_path):
    work = tmp_path / "work"
    for name in ("0", "1"):
        truncate(folder / "val" / "dog" / f"{name}.png")
    data = opened(folder, "skip", work)
    assert not work.exists(), "nothing is written before the run has its folder"
    work.mkdir()
    read = [data.validation[index] for index in range(6)]
    assert [label for _, label in read] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(read[3][0], read[5][0]), "the next good sample stands for a bad one"
    assert torch.equal(opened(folder, "skip", work).validation[3][0], read[3][0])
    assert count_skipped(work) == "2 validation"
    lines = [json.loads(line) for line in (work / SKIPPED_FILE).read_text().splitlines()]
    assert {line["part"] for line in lines} == {"validation"}
    assert "0.png, label 1" in lines[0]["sample"]


def test_a_loop_over_the_samples_ends(tmp_path):
    samples = CheckedSamples([(image, 0) for image in IMAGES], "train", "skip", tmp_path)
    assert len([item for item in samples]) == 6
    assert samples[-1][0] is samples[5][0]


def test_data_that_are_all_bad_are_refused(tmp_path):
    samples = CheckedSamples([None] * 5, "train", "skip", tmp_path)
    with pytest.raises(SampleError, match="after it cannot be used either"):
        samples[0]


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, ending):
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / f"deep.{ending}")
    found = np.asarray(read_image(tmp_path / f"deep.{ending}"))
    assert np.array_equal(found, np.arange(256).reshape(16, 16, 1).repeat(3, 2))


def test_a_run_that_met_a_bad_image_is_resumed_without_it(config, tmp_path, monkeypatch):
    net = (config.parent / "faulty_net.py").read_text()
    place = tmp_path / "configs"
    shutil.copytree(config.parent, place, ignore=shutil.ignore_patterns("__pycache__"))
    dying = """
class Dying:
    \"\"\"Sample 7 cannot be read once the run has begun.\"\"\"

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        import os
        if index == 7 and os.path.exists(os.environ["DYING"]):
            raise OSError("image file is truncated")
        return self.samples[index]


def dying(options):
    return data(options, Dying(samples(48, 0)))
"""
    (place / "dying_net.py").write_text(net + dying)
    monkeypatch.setenv("DYING", str(tmp_path / "work" / "experiment.json"))
    command = ["train", place / "tiny.py", "--work-dir", tmp_path / "work", "--data.function", "dying_net:dying"]
    first = halfeven(*command)
    second = halfeven(*command, "--resume", "--data.on-bad-sample", "skip")
    assert first.returncode == 2, first.stdout + first.stderr
    assert "sample 7 cannot be used: OSError: image file is truncated" in " ".join(first.stderr.split())
    assert "Traceback" not in first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    assert "replaced by the next good ones (1 train, 1 calibration)" in " ".join(second.stdout.split())
