"""A small experiment that takes seconds: a residual network with dropout on a part of the digits."""

from pathlib import Path

import pytest

from runtimes.parity import SCHEME

from .running import in_a_process

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
        self.fc = nn.Linear(16 * width, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.drop(F.avg_pool2d(x, 4).flatten(1)))


def digits(options):
    data = datasets.digits(options)
    return datasets.Datasets(
        train=Subset(data.train, range(256)),
        calibration=Subset(data.calibration, range(32)),
        validation=Subset(data.validation, range(100)),
        num_classes=10,
    )
'''

CONFIG = f"""
from halfeven.config import DeviceOptions, Experiment, ExportOptions
from halfeven.placement.plan import QuantizationOptions
from halfeven.training.options import TrainingOptions
from halfeven.zoo.options import DataOptions
from halfeven.zoo.models import ModelOptions

experiment = Experiment(
    model=ModelOptions(source="callable", name="tiny_net:Net"),
    data=DataOptions(source="callable", function="tiny_net:digits", workers=0),
    quantization=QuantizationOptions(scheme="{SCHEME}"),
    pretraining=TrainingOptions(epochs=2, batch_size=16, learning_rate=0.1, save_every=1),
    training=TrainingOptions(epochs=3, batch_size=16, learning_rate=0.01, save_every=1),
    device=DeviceOptions(kind="cpu", threads=1),
    export=ExportOptions(timed=False),  # for a latency the float model is written, too
)
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny_net.py").write_text(NET)
    (folder / "tiny.py").write_text(CONFIG)
    return folder / "tiny.py"


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory) -> tuple[Path, str]:
    """The work folder of a whole, uninterrupted run of the small experiment, and what the run said."""
    folder = tmp_path_factory.mktemp("trained") / "work"
    done = in_a_process("train", config, "--work-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout
