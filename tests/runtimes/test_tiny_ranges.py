"""Tensors nearer to 0 than 1e-6, whose zero point OpenVINO would forget."""

import pytest
import torch
from torch import nn

import halfeven as he


def shrinking(size):
    """A layer whose results are tiny, and another that makes up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[2].weight *= size
        model[2].bias *= size
        model[3].weight /= size
    return model


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("size", [1e-6, 1e-8])
def test_a_layer_of_tiny_results_is_that_of_the_simulation(size, target, tmp_path):
    model, x = shrinking(size), torch.randn(64, 8)
    qmodel = he.quantize(model, [x], target=target, scheme="w7a8")
    path = he.export(qmodel, tmp_path / ("m.xml" if target == "openvino" else "m.onnx"))
    report = he.verify(qmodel, path, [x], timed=False)
    assert report.integer_match == 1
    assert not report.findings
    assert report.outputs[0].float_simulation_difference < 0.01


def test_the_reason_is_named_where_fewer_bits_lose_the_zero_point(tmp_path):
    x = torch.randn(64, 8)
    qmodel = he.quantize(shrinking(1e-8), [x], scheme="w7a7")
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "m.xml"), [x], timed=False)
    assert "are so near to 0 that the runtime forgets the zero point" in report.findings[0]
