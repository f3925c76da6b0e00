"""A small experiment that takes seconds: a residual network with dropout on a part of the digits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NET = '''
"""A residual network with everything that makes resuming hard: BatchNorm, dropout, a shortcut."""

from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

from halfeven.zoo import datasets


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def digits(options):
    data = datasets.digits(options)
    return datasets.Datasets(
        train=Subset(data.train, range(256)),
        calibration=Subset(data.calibration, range(32)),
        validation=Subset(data.validation, range(100)),
        num_classes=10,
    )
'''

CONFIG = """
from halfeven.config import DeviceOptions, Experiment
from halfeven.placement.plan import QuantizationOptions
from halfeven.training.options import TrainingOptions
from halfeven.zoo.datasets import DataOptions
from halfeven.zoo.models import ModelOptions

experiment = Experiment(
    model=ModelOptions(source="callable", name="tiny_net:Net"),
    data=DataOptions(source="callable", function="tiny_net:digits", workers=0),
    quantization=QuantizationOptions(),
    pretraining=TrainingOptions(epochs=2, batch_size=16, learning_rate=0.1, save_every=1),
    training=TrainingOptions(epochs=3, batch_size=16, learning_rate=0.01, save_every=1),
    device=DeviceOptions(kind="cpu", threads=1),
)
"""


@pytest.fixture
def config(tmp_path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny_net.py").write_text(NET)
    (folder / "tiny.py").write_text(CONFIG)
    return folder / "tiny.py"


def environment() -> dict[str, str]:
    """Without fused kernels, whose compilation takes longer than these runs; without the threads of other tests."""
    return {**os.environ, "HALFEVEN_COMPILE": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def halfeven(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "halfeven.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
