"""Integers, and averages of them, in arithmetic with numbers and constants of channels, in OpenVINO.

The plugin keeps bytes behind a number, on another scale with another zero: a clip behind stops at whole bytes. A pool's
average is rounded for whatever its kernel does not take in.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from runtimes.parity import quantized
from sweeps import sweep


class Numbers(nn.Module):
    """Functions of one tensor that has integers already, since a layer reads it too."""

    def __init__(self, signed):
        super().__init__()
        self.signed = signed
        self.stem, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.readers = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(12))

    def forward(self, x):
        x = self.stem(x)
        x = F.max_pool2d(x if self.signed else F.relu(x), 2)
        found = [1 - x, (1 - x) + 1, -(x + 0.7), (x + 1) * 2, torch.relu((x - 0.5) / 3)]
        found += [(x * 2 + 1).clamp(1.1, 2.3), (0.3 - x).clamp(-0.5, 0.2), F.relu6(x + 3) / 6]
        found += [F.leaky_relu(x - 0.5, 0.1), F.interpolate(1 - x, scale_factor=2), (1 - x) + x, (1 - x) * x]
        return self.other(x), [read(y) for read, y in zip(self.readers, found, strict=True)]


CHANNELS = (1, 8, 1, 1)
READERS = {
    "a number more": lambda x, c: x + 1,
    "its double": lambda x, c: x * 2,
    "one minus": lambda x, c: 1 - x,
    "channels added": lambda x, c: x + c,
    "channels subtracted": lambda x, c: c - x,
    "times channels": lambda x, c: x * c,
    "times channels, clipped": lambda x, c: (x * c).clamp(0, 0.4),
    "times channels, SiLU": lambda x, c: F.silu(x * c),
    "over channels, ReLU": lambda x, c: torch.relu(x / c),
    "a number more, ReLU": lambda x, c: torch.relu(x + 1),
    "its double, SiLU": lambda x, c: F.silu(x * 2),
    "joined, ReLU": lambda x, c: torch.relu(torch.cat([x, x], 1)[:, 4:12]),
    "joined, clipped": lambda x, c: torch.cat([x, x], 1)[:, 4:12].clamp(0, 0.4),
    "joined, doubled": lambda x, c: torch.cat([x, x], 1)[:, 4:12] * 2,
    "positions added": lambda x, c: x + torch.linspace(-1, 1, 8),
}


class Averages(nn.Module):
    """Averages of integers, each with a reader of its own: where a reader takes bytes, the average is rounded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers, self.others, self.readers = (
            nn.ModuleList(nn.Conv2d(8, outputs, 1) for _ in range(len(READERS) + 2)) for outputs in (8, 1, 2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.weight, 0.5, 2.0)
        self.register_buffer("channels", torch.rand(CHANNELS) + 0.5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        functions = [lambda y, read=read: read(y, self.channels) for read in READERS.values()]
        functions += [self.norms[0], lambda y: self.norms[1](y * 2)]
        found = []
        for layer, other, read, function in zip(self.layers, self.others, self.readers, functions, strict=True):
            y = F.relu(layer(x))
            found += [other(y), read(function(F.avg_pool2d(y, 2)))]
        return found


def check(model, scheme, tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(model, (4, 3, 16, 16), scheme=scheme)
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match == 1.0, [tensor.name for tensor in report.tensors if tensor.different]
    assert sum(tensor.count for tensor in report.tensors) > 20_000


@pytest.mark.parametrize(
    ("scheme", "signed"), sweep(itertools.product(("w7a7", "w7a8"), (True, False)), ("w7a7", True))
)
def test_integers_with_numbers_stay_integers(scheme, signed, tmp_path):
    check(Numbers(signed), scheme, tmp_path)


@pytest.mark.parametrize("scheme", sweep(("w7a7", "w7a8"), "w7a7"))
def test_an_average_is_rounded_for_what_its_kernel_does_not_take_in(scheme, tmp_path):
    check(Averages(), scheme, tmp_path)
