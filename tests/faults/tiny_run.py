"""A run that takes about a second: a network of two layers on small images, and the comparison of two such runs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from halfeven.training.state import load_state
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

EVERYTHING = """
import dataclasses

from halfeven.config import *
from tiny import experiment

experiment = dataclasses.replace(
    experiment,
    quantization=QuantizationOptions(scheme="w4a4", ranges="learned", batchnorm="fold"),
    ptq=PTQOptions(iterations=4, batch_size=8, memory=1e-6),
    qat=QATOptions(
        equalize="on",
        distill="on",
        average="on",
        freeze_oscillations="on",
        dampen_oscillations="on",
        progress="on",
    ),
)
"""
"""Every step that can accompany a training; activations of the reconstruction that go to files."""


def write_configs(folder: Path) -> Path:
    """Write the net and its configs, tiny.py and everything.py. Returns the first."""
    (folder / "faulty_net.py").write_text(NET)
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "everything.py").write_text(EVERYTHING)
    return folder / "tiny.py"


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without what depends on the clock; [] where there is none."""
    if not (folder / "log.jsonl").is_file():
        return []
    timed = ("time", "samples_per_second")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def lost_lines(whole: Path, cut: Path) -> int:
    """Return how many lines of the logs of a whole run another run lacks, or has in another place."""
    lost = 0
    for part in ("", "float"):
        wanted = log_lines(whole / part)
        found = log_lines(cut / part)
        lost += max(len(wanted), len(found)) - sum(a == b for a, b in zip(wanted, found, strict=False))
    return lost


def differences(whole: Path, cut: Path, *, one_process: bool = False) -> list[str]:
    """Name what differs between the folders of two runs that should have ended with the same bits.

    Args:
        whole: folder of a run that nothing disturbed.
        cut: folder of the other run.
        one_process: the runs took place in one process, whose converters number what they name: names in files differ.
    """
    compared = {ending: same for ending, same in COMPARED.items() if not (one_process and ending in NAMED)}
    found = [f"{lost} log lines"] if (lost := lost_lines(whole, cut)) else []
    names = {path.relative_to(folder) for folder in (whole, cut) for path in folder.rglob("*") if path.is_file()}
    for name in sorted(names):
        if "tensorboard" in name.parts:
            continue
        if not ((whole / name).is_file() and (cut / name).is_file()):
            found.append(f"{name} is there once")
        elif name.suffix in compared and not compared[name.suffix](whole / name, cut / name):
            found.append(f"{name} differs")
    return found


def _same_tensors(first: Path, second: Path) -> bool:
    return _same(load_file(first), load_file(second))


def _same_states(first: Path, second: Path) -> bool:
    return _same(vars(load_state(first)), vars(load_state(second)))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)


def _same_bytes(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


COMPARED = {
    ".safetensors": _same_tensors,
    ".pt": _same_states,
    ".xml": _same_bytes,
    ".bin": _same_bytes,
    ".onnx": _same_bytes,
}
"""Ending of a file -> True for two whose content is the same."""
NAMED = (".xml", ".onnx")
"""Endings of files that hold names which a converter numbers."""
