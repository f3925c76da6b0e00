"""Quantization without data: ranges and bias correction from BatchNorm."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import AlgorithmError, CalibrationError
from halfeven.layerwise.calibrate import set_weight_ranges
from halfeven.ptq.data_free.calibrate import correct_biases_analytically, mean_shift, ranges_from_batchnorm
from halfeven.ptq.data_free.moment_propagation import InputDistribution
from halfeven.ptq.equalization.bias_absorption import absorb_biases
from halfeven.ptq.equalization.cross_layer import equalize, unclip_relu6
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode
from nets import IMAGE, prepared
from ptq.test_moment_propagation import images, measured
from runtimes.parity import SCHEME


class Small(nn.Module):
    """A network of MobileNet's parts, small."""

    def __init__(self, act=F.relu):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.thin, self.norm3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc, self.act = nn.Linear(8, 4, bias=False), act

    def forward(self, x):
        x = self.act(self.norm0(self.stem(x)))
        y = self.act(self.norm2(self.deep(self.act(self.norm1(self.wide(x))))))
        return self.fc((x + self.norm3(self.thin(y))).mean((2, 3)))


def ends(qmodel):
    return {name: (float(q.low), float(q.high)) for name, q in quantizers(qmodel).items() if not q.weight}


@pytest.mark.parametrize("alpha", [6.0, 3.0])
def test_ranges_are_those_of_the_white_paper(alpha):
    model = measured(Small(), images())
    qmodel = prepared(model)
    report = ranges_from_batchnorm(qmodel, alpha=alpha)
    high = {name: float((norm.bias + alpha * norm.weight.abs()).max().detach()) for name, norm in norms(model).items()}
    found = ends(qmodel)
    for name, norm in (("quantizers.relu", "norm0"), ("quantizers.relu_1", "norm1"), ("quantizers.relu_2", "norm2")):
        assert found[name] == pytest.approx((0, high[norm]))
    assert found["quantizers.x"] == (-3, 3)
    assert report.ranges["relu"] == pytest.approx((0, high["norm0"]))
    assert "x" in report.estimated
    assert "relu" not in report.estimated
    assert "(estimated)" in str(report)


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


@pytest.mark.parametrize("act", [F.relu6, F.silu, F.hardswish])
def test_ranges_go_through_the_activation(act):
    model = measured(Small(act), images())
    qmodel = prepared(model)
    ranges_from_batchnorm(qmodel)
    name = {F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"}[act]
    norm = model.norm1
    low, high = (norm.bias.detach() + sign * 6 * norm.weight.detach().abs() for sign in (-1, 1))
    points = act(low + torch.linspace(0, 1, 1001)[:, None] * (high - low))
    found = ends(qmodel)[f"quantizers.{name}_1"]
    assert found == pytest.approx((float(points.min()), float(points.max())), abs=3e-3)


@pytest.mark.parametrize("options", [{}, {"ranges": "learned", "scheme": "w4a8"}, {"weight_observer": "mse"}])
def test_afterwards_the_model_is_calibrated_and_close_to_float(options):
    x = images()
    model = measured(Small(), x)
    qmodel = prepared(model, **options)
    ranges_from_batchnorm(qmodel)
    assert all(
        q.state.has_range and q.mode is Mode.QUANTIZE and q.observer is None for q in quantizers(qmodel).values()
    )
    with torch.no_grad():
        noise = (qmodel.eval()(x) - model(x)).square().mean() / model(x).var()
    assert noise < (0.3 if "scheme" in options else 0.02)


def test_weights_are_as_calibration_sets_them():
    model = measured(Small(), images())
    one, other = (prepared(model, weight_observer="mse", scheme="w4a8") for _ in range(2))
    ranges_from_batchnorm(one)
    he.calibrate(other, [images()])
    for name, quantizer in quantizers(one).items():
        if quantizer.weight:
            assert torch.equal(quantizer.scale, quantizers(other)[name].scale)


def test_fixed_ranges_and_fixed_weights_stay():
    qmodel = prepared(measured(Small(), images()))
    quantizers(qmodel)["quantizers.relu"].fix_range((0.0, 1.25))
    quantizers(qmodel)["fc.weight_quantizer"].fix_range((-9.0, 9.0))
    ranges_from_batchnorm(qmodel)
    assert ends(qmodel)["quantizers.relu"] == (0.0, 1.25)
    assert float(quantizers(qmodel)["fc.weight_quantizer"].scale.max()) == pytest.approx(9 / 127, rel=1e-3)


def test_without_batchnorm_ranges_are_estimated():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    qmodel, x = prepared(model), images()
    report = ranges_from_batchnorm(qmodel)
    assert set(report.estimated) == set(report.ranges)
    with torch.no_grad():
        assert (qmodel(x) - model(x)).square().mean() < 0.01 * model(x).var()


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(torch.cumsum(self.a(x), 1))


def test_what_nothing_is_known_of_is_an_error_and_nothing_is_set():
    qmodel = prepared(Unknown(), (2, 4))
    with pytest.raises(AlgorithmError, match=r"the distribution of cumsum is unknown.*Give a loader"):
        ranges_from_batchnorm(qmodel)
    assert not any(q.state.has_range for q in quantizers(qmodel).values())
    report = correct_biases_analytically(qmodel)
    assert report.left == ("b (the distribution of its input is unknown)",)
    assert "left alone: b" in str(report)


def test_weight_ranges_alone():
    qmodel = prepared(measured(Small(), images()))
    set_weight_ranges(qmodel)
    assert {q.weight for q in quantizers(qmodel).values() if q.state.has_range} == {True}
    assert sum(q.state.has_range for q in quantizers(qmodel).values()) == 5
    with torch.no_grad():
        qmodel.get_submodule("fc").weight.mul_(2)
        before = qmodel.get_submodule("fc").weight_quantizer.scale.clone()
    set_weight_ranges(qmodel, missing_only=True)
    assert torch.equal(qmodel.get_submodule("fc").weight_quantizer.scale, before)
    set_weight_ranges(qmodel)
    torch.testing.assert_close(qmodel.get_submodule("fc").weight_quantizer.scale, 2 * before)
    with torch.no_grad():
        qmodel.get_submodule("fc").weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="the weight of fc"):
        set_weight_ranges(qmodel)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 4, 2, 2)],
    ids=["linear", "grouped", "depthwise", "transposed"],
)
def test_the_shift_of_the_mean_is_that_of_samples(layer):
    mean = torch.rand(6) * 3
    shape = (4, 6) if isinstance(layer, nn.Linear) else (4, 6, 8, 8)
    x = mean.reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_((layer.weight * 8).round() / 8)
        expected = (other(x) - layer(x)).movedim(1, 0).flatten(1).mean(1)
        found = mean_shift(layer, other.weight, mean).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def weights_only(qmodel):
    """The model with activations in float: what is left is the weights' error."""
    for quantizer in quantizers(qmodel).values():
        quantizer.mode = Mode.QUANTIZE if quantizer.weight else Mode.FLOAT
    return qmodel


@pytest.mark.parametrize("bits", [4, 3])
def test_correction_takes_most_of_the_bias_error(bits):
    x = images()
    model = measured(Small(), x)
    biased = prepared(model, scheme=f"w{bits}a8", per_channel=False)
    set_weight_ranges(biased)
    corrected = copy.deepcopy(biased)
    report = correct_biases_analytically(corrected)
    assert set(report.shifts) == {"stem", "wide", "deep", "thin", "fc"}
    assert he.plan_of(corrected).changes.given_biases == ("fc",)

    def error(qmodel):
        with torch.no_grad():
            return float((weights_only(qmodel)(x) - model(x)).mean(0).square().sum())

    assert error(corrected) < 0.5 * error(biased)


def test_the_whole_way_without_data(tmp_path):
    """Equalization, absorption, analytic correction and ranges, saved, loaded and run by the real runtime."""
    x = images()
    model = measured(Small(F.relu6), x)
    with torch.no_grad():  # a hidden scaling of channels that ruins per-tensor weights
        factor = torch.logspace(-2, 0, 16)
        model.norm1.weight.mul_(factor)
        model.norm1.bias.mul_(factor)
        model.deep.weight.div_(factor[:, None, None, None])
    plain, best = (prepared(model, scheme=SCHEME, per_channel=False) for _ in range(2))
    ranges_from_batchnorm(plain)
    unclip_relu6(best)
    equalize(best)
    absorb_biases(best)
    correct_biases_analytically(best)
    ranges_from_batchnorm(best)

    def noise(qmodel):
        with torch.no_grad():
            return float((qmodel.eval()(x) - model(x)).square().mean())

    assert noise(best) < 0.1 * noise(plain)
    he.save(best, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", Small(F.relu6), torch.randn(IMAGE))
    assert torch.equal(loaded(x), best(x))
    he.export(best, tmp_path / "model.xml")
    report = he.verify(best, tmp_path / "model.xml", [x[:4]], timed=False)
    assert report.weights_match
    assert report.integer_match == 1


def test_inputs_as_given():
    qmodel = prepared(measured(Small(), images()))
    ranges_from_batchnorm(qmodel, inputs=InputDistribution(mean=0.4, std=0.2, low=0.0, high=1.0))
    assert ends(qmodel)["quantizers.x"] == (0.0, 1.0)
