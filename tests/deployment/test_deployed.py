"""The deployed form: BatchNorm folded without touching an integer, weights on their grids."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.deployment.deployed import deployed_form, recoverable
from halfeven.errors import CalibrationError
from halfeven.quantization.arithmetic import quantize
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Quantizer
from runtimes.parity import quantized, trained

IMAGE = (2, 3, 8, 8)


def net(layer=None, norm=None):
    return nn.Sequential(
        layer or nn.Conv2d(3, 6, 3, bias=False),
        norm or nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 4, 3),
    )


def integers_of(layer):
    quantizer = layer.weight_quantizer
    scale = quantizer.used_scale(layer.weight)
    return quantize(layer.weight, scale, torch.zeros_like(scale), quantizer.scheme)


def assert_same_outputs(qmodel, model, x):
    """The deployed form computes what the model does in eval mode, but for float32's last bits and what they round."""
    expected, found = qmodel.eval()(x), model(x)
    scale = (expected.max() - expected.min()) / 255
    assert (found - expected).abs().max() < scale
    assert (found - expected).abs().mean() < scale / 100


@pytest.mark.parametrize("ranges", ["observed", "learned"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_folding_keeps_the_integers(scheme, ranges):
    qmodel, (x, *_) = quantized(net(), IMAGE, scheme=scheme, ranges=ranges)
    model = deployed_form(qmodel)
    before, after = integers_of(qmodel.get_submodule("0")), integers_of(model.get_submodule("0"))
    sign = torch.sign(qmodel.get_submodule("1").weight).reshape(-1, 1, 1, 1)
    assert torch.equal(after, before * sign)
    assert torch.equal(integers_of(model.get_submodule("4")), integers_of(qmodel.get_submodule("4")))
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert_same_outputs(qmodel, model, x)


def test_weights_lie_on_their_grid():
    qmodel, _ = quantized(net(), IMAGE)
    for layer in deployed_form(qmodel).modules():
        if hasattr(layer, "weight_quantizer"):
            assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
            assert integers_of(layer).abs().max() <= 127


def test_gamma_of_zero_and_below():
    qmodel, _ = quantized(net(), IMAGE)
    norm = qmodel.get_submodule("1")
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, -1.0, 1e-38, -0.0, 2.0, -1e-3]))
    he.calibrate(qmodel, [torch.randn(IMAGE)])
    model, x = deployed_form(qmodel), torch.randn(IMAGE)
    layer = model.get_submodule("0")
    assert torch.isfinite(layer.weight).all()
    assert torch.isfinite(layer.weight_quantizer.scale).all()
    assert bool((layer.weight_quantizer.scale > 0).all())
    before, after = integers_of(qmodel.get_submodule("0")), integers_of(layer)
    assert torch.equal(after[1], -before[1])
    assert torch.equal(after[4], before[4])
    assert torch.equal(after[5], -before[5])
    assert after[0].abs().sum() == after[3].abs().sum() == 0
    assert torch.allclose(layer.bias[0], norm.bias[0])
    assert_same_outputs(qmodel, model, x)


@pytest.mark.parametrize("gamma", [[1.0, 0.5, 2.0, 3.0, 0.1, 1.0], [0.0, -1.0, 2.0, -0.3, 0.1, 1.0]])
def test_one_scale_for_the_weight_becomes_one_for_each_channel(gamma):
    qmodel, (x, *_) = quantized(net(), IMAGE, per_channel=False)
    with torch.no_grad():
        qmodel.get_submodule("1").weight.copy_(torch.tensor(gamma))
    assert qmodel.get_submodule("0").weight_quantizer.scale.ndim == 0
    he.calibrate(qmodel, [x])
    model = deployed_form(qmodel)
    layer = model.get_submodule("0")
    assert layer.weight_quantizer.scale.shape == (6,)
    sign = torch.sign(torch.tensor(gamma)).reshape(-1, 1, 1, 1)
    assert torch.equal(integers_of(layer), integers_of(qmodel.get_submodule("0")) * sign)
    assert_same_outputs(qmodel, model, x)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda: nn.ConvTranspose2d(3, 6, 3, 2), lambda: nn.BatchNorm2d(6), IMAGE),
        (lambda: nn.Conv2d(3, 6, 3, groups=3), lambda: nn.BatchNorm2d(6), IMAGE),
    ],
)
def test_each_kind_of_layer_takes_its_batchnorm_in(layer, norm, shape):
    qmodel, (x, *_) = quantized(net(layer(), norm()), shape)
    model = deployed_form(qmodel)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    axis = (1, -1, 1, 1) if isinstance(layer(), nn.ConvTranspose2d) else (-1, 1, 1, 1)
    sign = torch.sign(qmodel.get_submodule("1").weight).reshape(axis)
    assert torch.equal(integers_of(model.get_submodule("0")), integers_of(qmodel.get_submodule("0")) * sign)
    assert_same_outputs(qmodel, model, x)


def test_folded_before_needs_no_folding_after():
    qmodel, (x, *_) = quantized(net(), IMAGE, batchnorm="fold")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in qmodel.modules())
    model = deployed_form(qmodel)
    assert torch.equal(integers_of(model.get_submodule("0")), integers_of(qmodel.get_submodule("0")))
    assert_same_outputs(qmodel, model, x)


def test_the_model_itself_is_not_changed():
    qmodel, _ = quantized(net(), IMAGE)
    qmodel.train()
    before = copy.deepcopy(qmodel.state_dict())
    deployed_form(qmodel)
    assert qmodel.training
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    assert any(isinstance(m, nn.BatchNorm2d) for m in qmodel.modules())


def test_nothing_moves_any_more():
    qmodel, (x, *_) = quantized(net(), IMAGE, ranges="learned")
    model = deployed_form(qmodel)
    before = copy.deepcopy(model.state_dict())
    model.train()(x * 50)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not isinstance(q.scale, nn.Parameter) for q in quantizers(model).values())


def test_a_reused_layer_is_settled_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    qmodel, (x, *_) = quantized(Twice(), IMAGE)
    assert_same_outputs(qmodel, deployed_form(qmodel), x)


def test_without_ranges_there_is_nothing_to_deploy():
    qmodel = he.prepare(trained(net()), torch.randn(IMAGE))
    with pytest.raises(CalibrationError, match=r"no range yet.*calibrate"):
        deployed_form(qmodel)


def test_recoverable_scales_survive_their_ends():
    scale = torch.rand(2000) * torch.logspace(-8, 3, 2000)
    kept = recoverable(scale)
    end = kept * 127
    assert torch.equal((end + end) / 254, kept)
    assert ((kept - scale).abs() <= scale * 2.0**-16).all()


def test_used_scales_are_the_trained_ones():
    qmodel, _ = quantized(net(), IMAGE, ranges="learned")
    model = deployed_form(qmodel)
    for name, quantizer in quantizers(qmodel).items():
        if not quantizer.weight:
            other = model.get_submodule(name)
            assert isinstance(other, Quantizer)
            assert torch.equal(other.scale, quantizer.used_scale(torch.empty(0)))
            assert torch.equal(other.zero_point, quantizer.zero_point)
