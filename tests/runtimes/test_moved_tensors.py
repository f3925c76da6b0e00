"""OpenVINO's converter moves operators through quantizers and renames them; verify finds each tensor all the same."""

import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.runtimes.openvino.writer import name_moved_tensors
from runtimes.parity import quantized


class Layers(nn.Module):
    """Two layers with an operator of the test between them."""

    def __init__(self, between, a, b):
        super().__init__()
        self.between, self.a, self.b = between, a, b

    def forward(self, x):
        return self.b(self.between(self.a, x))


def stacked(layer, x):
    return torch.stack([layer(x[:, i]).tanh() for i in range(3)]).transpose(0, 1).mean(1)


MOVED = {
    "stack, transpose, mean": (stacked, (2, 3, 8), nn.Linear),
    "transpose, mean": (lambda layer, x: layer(x).relu().transpose(1, 2).mean(2), (2, 6, 8), nn.Linear),
    "permute, largest": (lambda layer, x: layer(x).relu().permute(1, 0, 2).amax(0), (2, 6, 8), nn.Linear),
    "permute, sum": (lambda layer, x: layer(x).tanh().permute(1, 0, 2).sum(0), (2, 6, 8), nn.Linear),
}


@pytest.mark.parametrize("name", sorted(MOVED))
def test_a_tensor_that_the_converter_moved_is_found_and_equal(name, tmp_path):
    between, shape, layer = MOVED[name]
    qmodel, batches = quantized(Layers(between, layer(8, 8), layer(8, 4)), shape)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.unseen == []
    assert report.integer_match == 1.0
    calls = 4 if between is stacked else 2  # each call of a layer counts
    assert report.integer_layers == report.quantizable_layers == calls
    assert len(report.tensors) >= 2


def test_a_tensor_that_the_file_has_in_another_layout_is_named_and_its_outputs_compared(tmp_path):
    """Two transpositions cancel through the mean's quantizer: the tensor of the model exists nowhere."""

    def between(layer, x):
        return layer(x).relu().transpose(1, 2).mean(2, keepdim=True).transpose(1, 2)

    qmodel, batches = quantized(Layers(between, nn.Linear(8, 8), nn.Linear(8, 4)), (2, 6, 8))
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.unseen in ([], ["mean"])
    assert report.integer_match == 1.0
    assert report.output_difference < 1e-6
    assert report.findings == []


def test_tracers_names_that_contradict_the_operators_are_not_used():
    """Both of two quantizers, one under another operator's name: nothing says then that the third is what it seems."""
    from openvino import opset13 as opset

    x = opset.parameter([2], name="x")
    first = opset.relu(x)
    second = opset.relu(first)
    first.set_friendly_name("quantizers.a")
    first.output(0).get_tensor().set_names({"fake_quantize:0"})
    second.output(0).get_tensor().set_names({"fake_quantize_1:0"})
    model = openvino.Model([second], [x])
    name_moved_tensors(model, {"fake_quantize:0": "quantizers.b", "fake_quantize_1:0": "quantizers.a"})
    assert second.output(0).get_names() == {"fake_quantize_1:0"}
    name_moved_tensors(model, {"fake_quantize:0": "quantizers.a", "fake_quantize_1:0": "quantizers.b"})
    assert second.output(0).get_names() == {"quantizers.b"}
