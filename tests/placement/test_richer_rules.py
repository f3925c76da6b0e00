"""Rules that choose grid, ranges and scales, and the door for a user's own observers and quantizers."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.checkpoint import read_facts
from halfeven.errors import CalibrationError, ConfigError, PlacementError
from halfeven.options import fits
from halfeven.placement.plan import Plan
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.own_class import OwnClass
from sweeps import sweep

from .parts import conv

pytestmark = pytest.mark.usefixtures("unfused")

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block of depthwise and pointwise layers, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth, self.point = conv(3), conv(groups=8), conv(kernel=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((nn.functional.hardswish(self.point(self.depth(x))) + x).mean((2, 3)))


class Third:
    """Proposes a third of the largest value seen of each channel."""

    version = 2

    def __init__(self, scheme):
        self.largest = 0.0

    def update(self, values):
        self.largest = values.flatten(1).abs().amax(1).clamp(min=self.largest)

    def range(self):
        return -self.largest / 3, self.largest / 3


class Doubled(he.Quantizer):
    """Passes twice the gradient, and keeps a tensor of its own."""

    version = "b"

    def __init__(self, scheme, **arguments):
        super().__init__(scheme, **arguments)
        self.register_buffer("mine", torch.zeros(3))

    def forward(self, x, clip=(-float("inf"), float("inf"))):
        result = super().forward(x, clip)
        return result + (result - result.detach()) if self.training else result


def made(*rules, **options):
    torch.manual_seed(0)
    qmodel = he.prepare(Net().eval(), X, rules=rules, **({"scheme": "w7a8"} | options)).eval()
    return he.calibrate(qmodel, [X])


def grids(qmodel):
    return {tensor.places[0]: tensor.scheme for tensor in he.plan_of(qmodel).tensors}


def quantizer_named(qmodel, name):
    return next(quantizer for quantizer in quantizers(qmodel).values() if quantizer.name == name)


EVERY = he.Rule(
    pattern="*",
    observer="minmax",
    per_channel=False,
    symmetric=True,
    signed=True,
    ranges="learned",
    power_of_two=True,
)


@pytest.mark.parametrize("target", sweep(("openvino", "onnxruntime", "tensorrt"), "openvino", "onnxruntime"))
def test_the_runtime_computes_the_integers_of_every_grid(target, tmp_path):
    mixed = [
        he.Rule(power_of_two=True),
        he.Rule(pattern="relu", signed=True),
        he.Rule(pattern="head", per_channel=False, ranges="lsq"),
    ]
    if target != "tensorrt":
        mixed += [he.Rule(pattern="depth", signed=True, symmetric=False), he.Rule(pattern="x", symmetric=True)]
    qmodel = made(*mixed, scheme="w8a8" if target == "tensorrt" else "w7a8", target=target)
    path = he.export(qmodel, tmp_path / ("m.xml" if target == "openvino" else "m.onnx"))
    report = he.verify(qmodel, path, [X], timed=False)
    assert (report.integer_match, report.findings, report.unseen) == (1.0, [], [])
    if target != "tensorrt":
        assert (grids(qmodel)["depth"].signed, grids(qmodel)["depth"].symmetric) == (True, False)
        assert (grids(qmodel)["x"].signed, grids(qmodel)["x"].symmetric) == (True, True)
    assert grids(qmodel)["relu"].signed
    assert quantizer_named(qmodel, "the weight of head").learned
    assert quantizer_named(qmodel, "the weight of head").scale.ndim == 0
    assert quantizer_named(qmodel, "the weight of stem").scale.ndim == 1


def test_all_scales_are_powers_of_two_and_stay_so_in_training():
    qmodel = made(he.Rule(power_of_two=True), ranges="learned").train()
    optimizer = torch.optim.SGD([q.scale for q in quantizers(qmodel).values() if q.learned], lr=0.3)
    qmodel(X).square().sum().backward()
    assert all(bool((q.scale.grad != 0).any()) for q in quantizers(qmodel).values() if q.learned)
    optimizer.step()
    for quantizer in quantizers(qmodel).values():
        scale = quantizer.used_scale(torch.ones(1))
        assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
        assert bool((quantizer.used_zero_point() % 2 == 0).all()) or not quantizer.scheme.power_of_two
    moved = [bool((q.scale != q.used_scale(torch.ones(1))).any()) for q in quantizers(qmodel).values() if q.learned]
    assert any(moved), "the stored scale takes any value, so that small steps add up"


def test_a_range_is_never_clipped_by_rounding_its_scale():
    wide = made(he.Rule(observer="minmax"))
    rounded = made(he.Rule(observer="minmax", power_of_two=True))
    for name, quantizer in quantizers(rounded).items():
        if not (quantizer.weight or quantizer.name == "x"):
            continue  # what is before it is rounded more, so that it sees other values
        exact = quantizers(wide)[name].scale
        assert bool((quantizer.scale >= exact).all())
        assert bool((quantizer.scale < 2.001 * exact).all())


REFUSED = {
    "an unsigned grid for negative values": (he.Rule(pattern="depth", signed=False, symmetric=True), {}, "clip to 0"),
    "a zero point in TensorRT": (
        he.Rule(pattern="relu", symmetric=False),
        {"target": "tensorrt"},
        "tensorrt has no integers of this kind",
    ),
    "no such weight": (he.Rule(pattern="relu", per_channel=False), {}, "no quantized weight"),
    "nothing set": (he.Rule(pattern="relu"), {}, "sets none of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_before_any_work(case):
    rule, options, said = REFUSED[case]
    with pytest.raises(PlacementError, match=said):
        he.plan(Net(), X, rules=(rule,), **options)


class Attention(nn.Module):
    def forward(self, x):
        x = x.flatten(2)
        return x @ (x.transpose(1, 2) @ x).softmax(-1)


def test_readers_without_a_zero_point_and_live_batchnorm_keep_their_needs():
    products = nn.Sequential(conv(3), Attention())
    with pytest.raises(PlacementError, match="without a zero point only"):
        he.plan(products, X, rules=(he.Rule(pattern="0", symmetric=False),))
    normalized = nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU(), conv())
    power_of_two = he.Rule(power_of_two=True)
    with pytest.raises(PlacementError, match=r'live BatchNorm.*"fold live"'):
        he.plan(normalized, X, rules=(power_of_two,))
    assert he.plan(normalized, X, rules=(power_of_two,), batchnorm="fold live").weights[0].scheme.power_of_two


def test_sixteen_bits_are_simulated_and_not_exported(tmp_path):
    rule = he.Rule(activation_bits=16)
    qmodel = made(rule)
    assert {scheme.bits for scheme in grids(qmodel).values()} == {16}
    assert "Simulated alone" in str(he.plan_of(qmodel).table())
    expected = Net().eval()
    expected.load_state_dict(qmodel.state_dict(), strict=False)
    with torch.no_grad():
        errors = [float((model(X) - expected(X)).square().mean()) for model in (made(), qmodel)]
    assert errors[1] < errors[0]
    with pytest.raises(PlacementError, match=r"depth \(16 bits\).* can only be simulated"):
        he.export(qmodel, tmp_path / "m.xml")
    assert list(tmp_path.iterdir()) == []
    he.set_rules(qmodel, he.Rule(activation_bits=8))
    assert he.plan_of(qmodel).simulated == ()


def test_plans_checkpoints_and_further_rules_carry_every_field(tmp_path):
    assert all(getattr(EVERY, name) is not None for name in ("observer", "per_channel", "signed", "ranges"))
    qmodel = made()
    he.set_rules(qmodel, EVERY)
    he.calibrate(qmodel, [X])
    torch.testing.assert_close(qmodel(X), made(EVERY)(X))
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", Net(), X)
    assert he.plan_of(loaded) == he.plan_of(qmodel)
    assert torch.equal(loaded(X), qmodel(X))
    plan = he.plan_of(qmodel)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_an_observer_of_the_users_own_sets_ranges_and_files_keep_its_name(tmp_path):
    qmodel = made(he.Rule(pattern="depth", observer=Third))
    quantizer = quantizer_named(qmodel, "depth")
    assert float(quantizer.high) == pytest.approx(-float(quantizer.low))
    with torch.no_grad():
        largest = float(qmodel.depth(torch.relu(qmodel.stem(X))).abs().amax())
    assert float(quantizer.high) == pytest.approx(largest / 3, rel=0.05)
    he.save(qmodel, tmp_path / "q.safetensors")
    (tensor,) = [t for t in read_facts(tmp_path / "q.safetensors")["plan"]["tensors"] if t["places"] == ["depth"]]
    assert tensor["observer"] == {"name": f"{__name__}.Third", "version": "2"}
    loaded = he.load(tmp_path / "q.safetensors", Net(), X)
    assert torch.equal(loaded(X), qmodel(X))
    assert he.plan_of(loaded) == he.plan_of(qmodel)
    with pytest.raises(ConfigError, match=r"Third \(2\), a class of your own"):
        he.calibrate(copy.deepcopy(loaded), [X])
    he.set_rules(loaded, he.Rule(pattern="depth", observer=Third))
    he.calibrate(loaded, [X])
    torch.testing.assert_close(loaded(X), qmodel(X))


def test_a_quantizer_of_the_users_own_trains_and_loads_without_its_code(tmp_path):
    qmodel = made(he.Rule(quantizer=Doubled))
    assert isinstance(quantizer_named(qmodel, "depth"), Doubled)
    assert isinstance(quantizer_named(qmodel, "the weight of depth"), Doubled)
    x = X.clone().requires_grad_()
    plain = X.clone().requires_grad_()
    qmodel.train()(x).sum().backward()
    made().train()(plain).sum().backward()
    assert float(x.grad.norm()) > 2 * float(plain.grad.norm())
    he.save(qmodel.eval(), tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", Net(), X)
    assert type(quantizer_named(loaded, "depth")) is he.Quantizer
    assert torch.equal(loaded(X), qmodel(X))
    assert "Doubled (b)" in str(he.plan_of(loaded).table())
    report = he.verify(loaded, he.export(qmodel, tmp_path / "m.xml"), [X], timed=False)
    assert report.integer_match == 1.0


class Scalar(Third):
    def range(self):
        return -self.largest.amax(), self.largest.amax()


def test_classes_that_set_no_range_are_refused():
    with pytest.raises(CalibrationError, match="1 range for 8 channels"):
        made(he.Rule(pattern="depth", observer=Scalar))
    for wrong in ((1.0, -1.0), None, (1.0,), (torch.ones(8), -torch.ones(8))):
        with pytest.raises(CalibrationError, match="which is no range"):
            made(he.Rule(pattern="depth", observer=type("Wrong", (Third,), {"range": lambda self, w=wrong: w})))
    with pytest.raises(CalibrationError, match="ended with ZeroDivisionError"):
        made(he.Rule(pattern="depth", observer=type("Raising", (Third,), {"range": lambda self: 1 / 0})))
    for methods in ({"__init__": lambda self: None}, {"update": lambda self: None}):
        with pytest.raises(ConfigError, match="cannot be called as"):
            he.Rule(observer=type("Narrow", (Third,), methods))
    for methods in ({"__init__": lambda self, scheme: None}, {"forward": lambda self, x: x}):
        with pytest.raises(ConfigError, match="cannot be called as"):
            he.Rule(quantizer=type("Narrow", (he.Quantizer,), methods))
    with pytest.raises(ConfigError, match="no method range"):
        he.Rule(observer=type("Half", (), {"update": lambda self, values: None}))
    with pytest.raises(ConfigError, match=r"no subclass of halfeven\.Quantizer"):
        he.Rule(quantizer=nn.Identity)
    with pytest.raises(ConfigError, match="a class like Observer or None"):
        he.Rule(observer="mse2")
    assert he.Rule(ranges="lsq").ranges == "learned"
    described = he.Rule(observer=Third).observer
    assert described == OwnClass(f"{__name__}.Third", "2")
    assert not fits(type[Third], described)
    assert dataclasses.replace(he.Rule(observer=Third), signed=True).observer == described
