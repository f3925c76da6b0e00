"""Resampling to the nearest element at ratios where runtimes would choose another element than torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.graph.capture import capture
from halfeven.graph.nearest_sizes import lower_uneven_resampling
from runtimes.parity import SCHEME


class Quarter(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.first(x).relu()
        return self.last(F.interpolate(y, size=(-(-x.shape[2] // 4), -(-x.shape[3] // 4))))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("free", [False, True])
def test_the_file_takes_the_elements_that_torch_takes(free, target, tmp_path):
    sizes = [(19, 21), (42, 30)] if free else [(19, 21)]
    batches = [torch.randn(2, 3, *size) for size in sizes]
    options = {"dynamic_shapes": {"x": {2: "height", 3: "width"}}} if free else {}
    qmodel = he.quantize(Quarter().eval(), batches, target=target, scheme=SCHEME, **options)
    path = he.export(qmodel, tmp_path / ("m.xml" if target == "openvino" else "m.onnx"))
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1
    assert report.output_difference < 1e-6


class Resized(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.fc, self.options = nn.Conv1d(2, 2, 1), options

    def forward(self, x):
        return F.interpolate(self.fc(x), **self.options)


@pytest.mark.parametrize(
    ("length", "options", "written"),
    [
        (21, {"size": 6}, 1),
        (12, {"size": 6}, 0),
        (10, {"size": 19}, 0),
        (8, {"scale_factor": 2.0}, 0),
        (21, {"size": 6, "mode": "linear"}, 0),
    ],
)
def test_only_what_runtimes_choose_otherwise_is_written_out(length, options, written):
    model, x = Resized(**options), torch.randn(2, 2, length)
    captured, _ = capture(model, x)
    assert lower_uneven_resampling(captured) == written
    assert torch.equal(captured(x), model.eval()(x))
