"""Layers of the file that a runtime merges, renames, or leaves out because nothing reads their values."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.runtimes.openvino.executed import executed_layers

pytestmark = pytest.mark.usefixtures("unfused")


class Scatters(nn.Module):
    """A mixture of experts' router: its scores are computed again for their size, as those of `sized` are."""

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.router, self.sized = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        y = F.relu(self.body(x))
        zeros = torch.zeros_like(self.router(y))
        values, index = self.router(y).topk(2, -1)
        twos = torch.full_like(self.sized(y).relu(), 2.0)
        return self.out(y) * zeros.scatter(-1, index, values).sum(-1, keepdim=True) * twos[:, :1]


class CallsTwice(nn.Module):
    """The chain of two layers is written twice, as in a function that each of two outputs calls."""

    def __init__(self):
        super().__init__()
        self.body, self.neck, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def scores(self, x):
        return self.head(F.relu(self.neck(F.relu(self.body(x)))))

    def forward(self, x):
        return self.scores(x), self.scores(x).softmax(-1)


class FixesItsBatch(nn.Module):
    """Linear layers on tokens of a fixed number, each of which ONNX Runtime joins with its bias under another name."""

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = F.relu(self.body(x))
        return self.out(torch.cat([y[i] for i in range(len(y))]).reshape(len(y), 5, 16))


CASES = [
    pytest.param(Scatters, (8, 6), "openvino"),
    pytest.param(CallsTwice, (8, 6), "openvino"),
    pytest.param(FixesItsBatch, (3, 5, 6), "onnxruntime"),
    pytest.param(Scatters, (8, 6), "onnxruntime", marks=pytest.mark.exhaustive),
    pytest.param(CallsTwice, (8, 6), "onnxruntime", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("build", "shape", "target"), CASES)
def test_calls_that_the_runtime_saves_or_renames_are_no_layers_in_float(build, shape, target, tmp_path):
    x = torch.randn(shape)
    qmodel = he.calibrate(he.prepare(build(), x, scheme="w7a7", target=target), [x]).eval()
    path = he.export(qmodel, tmp_path / ("m.xml" if target == "openvino" else "m.onnx"))
    report = he.verify(qmodel, path, [x], timed=False)
    assert report.float_layers == []
    assert report.quantizable_layers == report.integer_layers >= 2
    assert report.weights_match
    assert report.integer_macs == 1
    assert report.integer_match == 1


def test_a_layer_that_is_read_for_its_size_alone_has_no_integers():
    plan = he.plan(Scatters(), torch.randn(8, 6))
    assert [weight.name for weight in plan.weights] == ["body", "router", "out"]
    assert {row.name: row.reason for row in plan.left}["sized"] == "nothing reads its values, only their size"


def test_layers_in_float_for_want_of_the_right_target(tmp_path):
    """A convolution before a SiLU has a quantized result only where ONNX Runtime needs it."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 8, 8)
    reasons = []
    for target in ("openvino", "onnxruntime"):
        qmodel = he.quantize(net, [x], scheme="w7a8", target=target)
        path = he.export(qmodel, tmp_path / f"{target}.onnx", target="onnxruntime")
        report = he.verify(qmodel, path, [x], timed=False)
        reasons.append(report.float_reason)
        assert bool(report.float_layers) == bool(report.float_reason)
    assert reasons == ['made for openvino; use target="onnxruntime"', ""]


class RuntimeModel:
    """A compiled model whose account of its kernels is given: kind, names of the file."""

    def __init__(self, *kernels):
        self.kernels = kernels

    def get_runtime_model(self):
        return self

    def get_ordered_ops(self):
        return [self._node(kind, names) for kind, names in self.kernels]

    @staticmethod
    def _node(kind, names):
        told = {"layerType": kind, "originalLayersNames": names, "primitiveType": "brgemm_i8", "runtimePrecision": "u8"}
        info = {key: SimpleNamespace(astype=lambda _, value=value: value) for key, value in told.items()}
        return SimpleNamespace(get_rt_info=lambda: info, inputs=list)


def test_layers_that_openvino_names_anew_are_found_by_their_order():
    kernels = [("FullyConnected", "a,Multiply_1"), ("FullyConnected", "Multiply_7"), ("Convolution", "d/aten.conv2d")]
    kernels += [("Eltwise", "Add_3"), ("Convolution", "Multiply_9,Add_4")]
    found = executed_layers(RuntimeModel(*kernels), ["a", "b", "c"])
    assert [(layer.layer, layer.integer) for layer in found] == [("a", True), ("b", True), ("c", True)]


def test_a_layer_that_openvino_does_not_run_takes_no_other_kernel():
    kernels = [("FullyConnected", "Multiply_7"), ("FullyConnected", "d/aten.linear")]
    assert not any(layer.is_known for layer in executed_layers(RuntimeModel(*kernels), ["a", "b"]))
