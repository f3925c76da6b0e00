"""A run that takes about a second: a network of two layers on small images, without fused kernels."""

import pytest

from halfeven.quantization import compile as compilation
from runtimes.parity import SCHEME

NET = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from halfeven.zoo.datasets import Datasets


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def samples(count, seed, labels=3):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % labels
    return TensorDataset(torch.randn(count, 1, 8, 8, generator=generator) + targets.view(-1, 1, 1, 1), targets)


def data(options, train=None):
    train = train or samples(48, 0)
    return Datasets(train=train, calibration=Subset(train, range(8)), validation=samples(12, 1), num_classes=3)


def labels_beyond(options):
    return data(options, samples(48, 0, labels=5))


class Raising:
    def __len__(self):
        return 48

    def __getitem__(self, index):
        raise RuntimeError("the disk of the images is gone")


def raising(options):
    return data(options, Raising())


def float_labels(options):
    images, targets = samples(48, 0).tensors
    return data(options, TensorDataset(images, targets.float() / 2))


def doubles(options):
    images, targets = samples(48, 0).tensors
    return data(options, TensorDataset(images.double(), targets))


def sizes_differ(options):
    return data(options, [(torch.zeros(1, 8 + number % 2, 8), 0) for number in range(48)])
"""

CONFIG = f"""
from halfeven.config import *

experiment = Experiment(
    model=ModelOptions(source="callable", name="faulty_net:Net"),
    data=DataOptions(source="callable", function="faulty_net:data", workers=0),
    quantization=QuantizationOptions(scheme="{SCHEME}"),
    pretraining=TrainingOptions(epochs=1, batch_size=8, learning_rate=0.1, save_every=2),
    training=TrainingOptions(epochs=2, batch_size=8, learning_rate=0.01, save_every=2),
    device=DeviceOptions(kind="cpu", threads=1),
    export=ExportOptions(timed=False),
)
"""


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    monkeypatch.setattr(compilation, "_works", False)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faulty_net.py").write_text(NET)
    (folder / "tiny.py").write_text(CONFIG)
    return folder / "tiny.py"
