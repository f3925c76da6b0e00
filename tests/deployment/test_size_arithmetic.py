"""Arithmetic of free sizes in files: its results are Python's, in both runtimes."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import CaptureError
from sweeps import crossed

ENDINGS = {"openvino": ".xml", "onnxruntime": ".onnx"}
SIDES = {"x": {2: "height", 3: "width"}}


class Sized(nn.Module):
    """A function of a feature map between two layers."""

    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.function(self.first(x).relu()))


def padded_by(size):
    """A padding at the ends by a function of each side."""
    return lambda y: F.pad(y, (0, size(y.shape[3]), 0, size(y.shape[2])))


def windows(y):
    """Windows of a padded map, cut back to its own size, as in Swin; `contiguous` copies nothing on the example."""
    y = y.permute(0, 2, 3, 1)
    samples, height, width, channels = y.shape
    padded = F.pad(y, (0, 0, 0, (4 - width % 4) % 4, 0, (4 - height % 4) % 4))
    rows, columns = padded.shape[1] // 4, padded.shape[2] // 4
    parts = padded.view(samples, rows, 4, columns, 4, channels).transpose(2, 3)
    weighted = parts * parts.mean((3, 4), keepdim=True)
    whole = weighted.transpose(2, 3).reshape(samples, rows * 4, columns * 4, channels)
    cut = whole[:, :height, :width].contiguous().view(samples, height * width, channels)
    return cut.view(samples, height, width, channels).permute(0, 3, 1, 2)


FUNCTIONS = {
    "multiple": padded_by(lambda n: -n % 8),
    "cut back": lambda y: padded_by(lambda n: (8 - n % 8) % 8)(y)[:, :, : y.shape[2], : y.shape[3]],
    "rounded up": padded_by(lambda n: -(-n // 4)),
    "offset": lambda y: y[:, :, : y.shape[2] // 2 + (y.shape[2] - 18) // 4 + 2],
    "ceiling": padded_by(lambda n: math.ceil(n / 3)),
    "floor": padded_by(lambda n: math.floor(n * 0.4)),
    "rounded": padded_by(lambda n: round(n / 4)),
    "square": padded_by(lambda n: n**2 // 64),
    "root": lambda y: y * y.shape[2] ** -0.5,
    "larger": lambda y: F.pad(y, (0, max(y.shape[2], y.shape[3]) - y.shape[3])),
    "smaller": lambda y: y[..., : min(y.shape[3], 20)],
    "windows": windows,
}


@pytest.mark.parametrize(("name", "target"), crossed(FUNCTIONS, ENDINGS))
def test_sizes_are_computed_as_in_python(name, target, tmp_path):
    torch.manual_seed(0)
    model = Sized(FUNCTIONS[name]).eval()
    batches = [torch.randn(2, 3, *sides) for sides in ((16, 24), (14, 30), (21, 17))]
    options = {"scheme": "w7a8", "target": target, "dynamic_shapes": SIDES}
    qmodel = he.calibrate(he.prepare(model, batches[0], **options), batches)
    path = he.export(qmodel, tmp_path / f"m{ENDINGS[target]}")
    assert he.verify(qmodel, path, batches, timed=False).integer_match == 1


def test_a_decision_by_a_size_says_what_example_to_give():
    def padded_where_needed(y):
        return F.pad(y, (0, -y.shape[3] % 8)) if y.shape[3] % 8 else y

    with pytest.raises(
        CaptureError, match=r"does not run on inputs whose width is .*\n.*Give an example of sizes that need"
    ):
        he.prepare(Sized(padded_where_needed).eval(), torch.randn(2, 3, 16, 24), dynamic_shapes=SIDES)
