"""Images are normalised and of the right size; calibration takes a seeded part of training, as evaluation sees it."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from halfeven.errors import ConfigError
from halfeven.zoo.datasets import Datasets, load_datasets, read_idx
from halfeven.zoo.options import DataOptions


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_digits_are_normalised_and_split():
    data = load_datasets(DataOptions(source="digits", calibration_samples=100))
    assert (len(data.train), len(data.validation), len(data.calibration)) == (1437, 360, 100)
    images = torch.stack([data.train[i][0] for i in range(len(data.train))])
    assert images.shape[1:] == (1, 32, 32)
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02
    assert {int(data.train[i][1]) for i in range(200)} == set(range(10))
    assert data.example().shape == (2, 1, 32, 32)


def test_calibration_is_a_seeded_part_of_training():
    def chosen(seed):
        data = load_datasets(DataOptions(source="digits", calibration_samples=50, calibration_seed=seed))
        train = {data.train[i][0].numpy().tobytes() for i in range(len(data.train))}
        images = [data.calibration[i][0].numpy().tobytes() for i in range(50)]
        assert set(images) <= train
        return images

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


def test_a_folder_of_images_is_read(folder):
    data = load_datasets(DataOptions(root=str(folder), image_size=32, resize=40, calibration_samples=5))
    assert (len(data.train), len(data.validation), len(data.calibration), data.num_classes) == (12, 4, 5, 2)
    assert data.train[0][0].shape == data.validation[0][0].shape == (3, 32, 32)
    first, second = data.train[0][0], data.train[0][0]
    assert not torch.equal(first, second), "training images are cropped at random"
    assert torch.equal(data.calibration[0][0], data.calibration[0][0]), "calibration images are seen as in evaluation"


def test_image_folder_preprocessing(tmp_path):
    """A uniform image keeps its colour through scaling and cropping, so what comes out is the normalisation alone."""
    for part in ("train", "val"):
        (tmp_path / part / "grey").mkdir(parents=True)
        Image.new("RGB", (50, 70), (124, 116, 104)).save(tmp_path / part / "grey" / "0.png")
    image = load_datasets(DataOptions(root=str(tmp_path), image_size=32, resize=40)).validation[0][0]
    expected = (torch.tensor([124, 116, 104]) - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 32, 32), atol=1e-4, rtol=0)


def test_idx_round_trip(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a.gz").write_bytes(idx(pixels))
    assert np.array_equal(read_idx(tmp_path / "a.gz"), pixels)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"ab"), idx(np.zeros(5, np.uint8))[:-9]],
    ids=["no gzip", "too short", "cut off"],
)
def test_a_broken_idx_file_is_refused(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ConfigError, match="not a whole IDX file"):
        read_idx(tmp_path / "a.gz")


def test_fashion_mnist_of_another_size(tmp_path):
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((3, 28, 28), np.uint8)))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ConfigError, match="Fashion-MNIST has 60000"):
        load_datasets(DataOptions(source="fashion_mnist", root=str(tmp_path)))


def test_fashion_mnist_preprocessing(monkeypatch, tmp_path):
    pixels = {"train": np.full((60000, 28, 28), 255, np.uint8), "t10k": np.zeros((10000, 28, 28), np.uint8)}

    def read(path):
        stem = path.name.split("-")[0]
        return pixels[stem] if "images" in path.name else np.zeros(len(pixels[stem]), np.uint8)

    monkeypatch.setattr("halfeven.zoo.datasets.read_idx", read)
    data = load_datasets(DataOptions(source="fashion_mnist", root=str(tmp_path)))
    image = data.train[0][0]
    assert image.shape == (1, 32, 32)
    assert image[0, 16, 16] == pytest.approx((1 - 0.2860) / 0.3530)
    assert image[0, 1, 1] == pytest.approx(-0.2860 / 0.3530), "padded with black, before normalisation"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(root="auto"), "Set data.root"),
        (dict(root="/no/such/folder"), "no folder /no/such/folder"),
        (dict(source="fashion_mnist", root="/no/such/folder"), "dataset-fashion-mnist"),
        (dict(source="callable", function="builtins:repr"), "builtins:repr returned a str"),
        (dict(image_size=300), "cannot be cropped"),
        (dict(source="digits", calibration_samples=0), "calibration_samples=0"),
    ],
)
def test_wrong_data_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_datasets(DataOptions(**options))


def test_class_folders_must_agree(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(ConfigError, match=r"differ \(dog, wolf\)"):
        load_datasets(DataOptions(root=str(folder), image_size=32, resize=40))


def tiny(options: DataOptions) -> Datasets:
    images = [(torch.zeros(1, 2, 2), 0)]
    return Datasets(train=images, calibration=images, validation=images[:0], num_classes=1)


def test_empty_part_is_refused():
    with pytest.raises(ConfigError, match="validation part"):
        load_datasets(DataOptions(source="callable", function=f"{__name__}:tiny"))
