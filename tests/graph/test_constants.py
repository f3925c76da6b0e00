"""What is computed of constants alone is computed once; all else stays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.deployment.deployed import deployed_form
from halfeven.graph.capture import capture
from halfeven.graph.constants import fold_constants
from runtimes.parity import quantized

IMAGE = (4, 3, 12, 12)


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized at each call."""

    def forward(self, x):
        mean, variance = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias)


class Positions(nn.Module):
    """Adds a bias that a small network makes of fixed coordinates."""

    def __init__(self):
        super().__init__()
        self.conv, self.net = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.last = nn.Conv2d(4, 4, 1)
        self.register_buffer("coordinates", torch.randn(1, 2))

    def forward(self, x):
        return self.last(F.relu(self.conv(x)) + self.net(self.coordinates)[:, :, None, None])


def standardized():
    return nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), Standardized(8, 4, 3))


def functions(region):
    return [node for node in region.graph.nodes if node.op == "call_function"]


def test_a_graph_computes_the_same_with_fewer_operators():
    torch.manual_seed(0)
    model = standardized().eval()
    x = torch.randn(IMAGE)
    captured, _ = capture(model, x)
    before = len(functions(captured))
    expected = captured(x)
    fold_constants(captured, lambda module: False)
    captured.recompile()
    assert torch.equal(captured(x), expected)
    assert len(functions(captured)) < before - 8


def test_modules_on_constants_go_and_those_that_shall_stay_do_not():
    model = Positions().eval()
    x = torch.randn(IMAGE)
    captured, _ = capture(model, x)
    expected = captured(x)
    fold_constants(captured, lambda module: isinstance(module, nn.Linear) and module.in_features == 8)
    captured.recompile()
    assert torch.equal(captured(x), expected)
    assert [name for name, m in captured.named_modules() if isinstance(m, nn.Linear)] == ["net.2"]


def test_random_numbers_are_drawn_anew():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) + self.scale * torch.bernoulli(torch.full((4,), 0.5))

    program = torch.export.export(Noisy().eval(), (torch.randn(2, 4),), strict=False)
    graph = program.module()
    fold_constants(graph, lambda module: False)
    assert any("bernoulli" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize(("target", "path"), [("openvino", "model.xml"), ("onnxruntime", "model.onnx")])
@pytest.mark.parametrize("build", [standardized, Positions])
def test_layers_of_computed_weights_run_in_integers(target, path, build, tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(build(), IMAGE, target=target)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / path), batches, timed=False)
    assert report.integer_layers == report.quantizable_layers == 2
    assert report.weights_match
    assert report.integer_match == 1.0
    assert report.integer_macs == 1.0


def test_a_trained_computed_weight_is_deployed_as_it_is_now():
    torch.manual_seed(0)
    qmodel, batches = quantized(nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), IMAGE)
    with torch.no_grad():
        qmodel.get_parameter("0.weight").add_(torch.randn(8, 3, 3, 3))
    assert torch.allclose(deployed_form(qmodel)(batches[0]), qmodel(batches[0]), atol=1e-4)
