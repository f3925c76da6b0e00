"""SiLU and hard-swish as products of integers in ONNX Runtime, and hard sigmoids as additions, to the last integer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import ConfigError, PlacementError
from halfeven.placement.insertion import plan_of
from runtimes.parity import quantized
from runtimes.test_activations_onnxruntime import optimized

IMAGE = (4, 3, 16, 16)

pytestmark = pytest.mark.usefixtures("unfused")


class Gated(nn.Module):
    """A stem with BatchNorm and hard-swish, squeeze and excitation with a hard sigmoid, and a SiLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.reduce, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.middle, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = F.hardswish(self.norm(self.stem(x)))
        x = x * F.hardsigmoid(self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()))
        return self.last(F.silu(self.middle(x)))


class Stem(nn.Module):
    """A hard sigmoid of an input that is wider than its slope, so that both ends clip, or narrower."""

    def __init__(self, spread):
        super().__init__()
        self.layer, self.last, self.spread = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), spread

    def forward(self, x):
        with_ends = self.layer(x * self.spread)
        return self.last(with_ends * F.hardsigmoid(with_ends))


class ReturnedGate(Stem):
    """The hard sigmoid is an output of the model too."""

    def forward(self, x):
        x = self.layer(x)
        gate = F.hardsigmoid(x)
        return {"gate": gate, "features": self.last(x * gate)}


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_gates_are_computed_in_integers_exactly(ranges, tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(Gated(), IMAGE, target="onnxruntime", quantize_gates=True, ranges=ranges)
    assert "2 SiLU and hard-swish are written out" in " ".join(str(plan_of(qmodel)).split())
    qmodel.train()(batches[0]).square().mean().backward()
    assert qmodel.get_submodule("stem").weight.grad.abs().max() > 0
    path = he.export(qmodel.eval(), tmp_path / "model.onnx")
    kinds = optimized(path, tmp_path)
    assert {kinds.count("QLinearMul"), kinds.count("QLinearAdd")} == {3, 2}
    assert kinds.count("QLinearSigmoid") == 1
    assert not {"HardSigmoid", "QuickGelu", "HardSwish"} & set(kinds)
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1
    assert report.findings == []


@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_a_hard_sigmoid_between_quantizers_is_an_addition(spread, tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(Stem(spread), IMAGE, target="onnxruntime")
    path = he.export(qmodel, tmp_path / "model.onnx")
    kinds = optimized(path, tmp_path)
    assert (kinds.count("QLinearAdd"), kinds.count("HardSigmoid")) == (1, 0)
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1


def test_a_hard_sigmoid_that_the_model_returns_is_exact(tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(ReturnedGate(1.0), IMAGE, target="onnxruntime")
    path = he.export(qmodel, tmp_path / "model.onnx")
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1
    assert report.findings == []


def test_checkpoints_keep_gates_and_targets_without_them_refuse(tmp_path):
    torch.manual_seed(0)
    net = Gated()
    qmodel, batches = quantized(net, IMAGE, target="onnxruntime", quantize_gates=True)
    he.save(qmodel, tmp_path / "model.safetensors")
    loaded = he.load(tmp_path / "model.safetensors", net, batches[0])
    assert torch.equal(loaded(batches[0]), qmodel(batches[0]))
    with pytest.raises(PlacementError, match=r"quantize_gates=True.* openvino computes SiLU and hard-swish with"):
        he.plan(net, batches[0], quantize_gates=True)
    with pytest.raises(PlacementError, match="the scheme w8a16 leaves activations in float"):
        he.plan(net, batches[0], quantize_gates=True, scheme="w8a16", target="onnxruntime")
    with pytest.raises(ConfigError, match="behind a convolution, and this model has none there"):
        he.plan(Stem(1.0), batches[0], quantize_gates=True, target="onnxruntime")
    perceptron = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4))
    with pytest.raises(ConfigError, match="behind a convolution, and this model has none there"):
        he.plan(perceptron, torch.randn(4, 8), quantize_gates=True, target="onnxruntime")


def test_targets_that_gain_nothing_by_gates_refuse_the_model(tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(Gated(), IMAGE, target="onnxruntime", quantize_gates=True)
    own = he.export(qmodel, tmp_path / "own.onnx")
    refusal = 'quantize_gates=True for onnxruntime, and {0} computes .*Prepare the model with target="{0}" and without'
    for target, name in (("openvino", "model.xml"), ("openvino", "model.onnx"), ("tensorrt", "model.onnx")):
        with pytest.raises(PlacementError, match=refusal.format(target)):
            he.export(qmodel, tmp_path / name, target=target)
        assert not (tmp_path / name).exists()
        with pytest.raises(ConfigError, match="written for onnxruntime"):
            he.verify(qmodel, own, batches, target=target)
    with pytest.raises(PlacementError, match=refusal.format("openvino")):
        he.exact(qmodel, "openvino")


def test_only_activations_behind_a_convolution_are_written_out():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Flatten(), nn.Linear(1024, 8), nn.SiLU(), nn.Linear(8, 4))
    plan = he.plan(net, torch.randn(IMAGE), quantize_gates=True, target="onnxruntime")
    assert "1 SiLU and hard-swish are written out" in " ".join(str(plan).split())
