"""The quantizer module: its state, when its range moves, and learned scales."""

import copy

import pytest
import torch
from torch import nn

from halfeven.errors import CalibrationError
from halfeven.quantization.arithmetic import RANGE_MOMENTUM, scale_and_zero_point, snap
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.model_quantizers import quantizers, set_mode, set_observing
from halfeven.quantization.observers import OBSERVERS
from halfeven.quantization.quantizer import Mode, Quantizer, RangeState
from halfeven.quantization.scheme import Scheme

pytestmark = pytest.mark.usefixtures("fused")

ACTIVATION = Scheme()
WEIGHT = Scheme(signed=True, symmetric=True, narrow=True)
PER_CHANNEL = Scheme(signed=True, symmetric=True, narrow=True, axis=0)


def activation(**options):
    return Quantizer(ACTIVATION, **options)


def weight(**options):
    return Quantizer(PER_CHANNEL, channels=3, weight=True, **options)


def calibrated(quantizer, x=None):
    quantizer.start_calibration()
    quantizer(torch.linspace(-1, 2, 100) if x is None else x)
    quantizer.finish_calibration()
    return quantizer


@pytest.mark.parametrize(
    ("quantizer", "shapes"),
    [
        (lambda: activation(), {"scale": (), "zero_point": (), "observing": (), "low": (), "high": ()}),
        (lambda: activation(ranges="learned"), {"scale": (), "zero_point": (), "observing": ()}),
        (lambda: weight(), {"scale": (3,), "zero_point": (3,), "observing": ()}),
        (lambda: weight(ranges="learned"), {"scale": (3,), "zero_point": (3,), "observing": ()}),
        (lambda: Quantizer(WEIGHT, weight=True), {"scale": (), "zero_point": (), "observing": ()}),
    ],
)
def test_state_has_its_final_shapes_from_the_start(quantizer, shapes):
    fresh = quantizer()
    assert {name: tuple(value.shape) for name, value in fresh.state_dict().items()} == shapes
    x = torch.randn(3, 50)
    used = calibrated(quantizer(), x)
    used.train()(x)
    assert {name: tuple(value.shape) for name, value in used.state_dict().items()} == shapes
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(fresh.eval()(x), used.eval()(x))


def test_only_a_learned_scale_is_a_parameter():
    assert [name for name, _ in activation(ranges="learned").named_parameters()] == ["scale"]
    assert list(activation().parameters()) == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_a_quantizer_without_a_range_is_an_error(ranges, training):
    quantizer = activation(ranges=ranges).train(training)
    quantizer.set_observing(False)
    quantizer.name = "layer1.relu"
    with pytest.raises(CalibrationError, match=r"layer1\.relu has no range yet.*calibrate"):
        quantizer(torch.randn(4))


@pytest.mark.parametrize("name", sorted(set(OBSERVERS) - {"lsq"}))  # whose range is no range of the data
def test_calibration_passes_the_tensor_through_and_sets_the_range(name):
    quantizer = activation(observer=name)
    x = torch.linspace(-1, 2, 1000)
    quantizer.start_calibration()
    assert quantizer(x) is x
    quantizer.finish_calibration()
    expected = scale_and_zero_point(quantizer.low, quantizer.high, ACTIVATION)
    assert torch.equal(quantizer.scale, expected[0])
    assert torch.equal(quantizer.zero_point, expected[1])
    assert quantizer.low.item() == pytest.approx(-1, abs=0.05)
    assert quantizer.high.item() == pytest.approx(2, abs=0.05)
    assert torch.equal(quantizer.eval()(x), fake_quantize(x, *expected, ACTIVATION))


@pytest.mark.parametrize("ranges", ["observed", "learned"])
@pytest.mark.parametrize("observing", [False, True])
def test_nothing_moves_in_eval(ranges, observing):
    quantizer = calibrated(activation(ranges=ranges)).eval()
    quantizer.set_observing(observing)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(10) * 100)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_a_training_batch_moves_an_observed_range_by_the_momentum():
    quantizer = calibrated(activation(observer="minmax"), torch.tensor([-1.0, 2.0])).train()
    quantizer(torch.tensor([-11.0, 5.0]))
    assert quantizer.low.item() == pytest.approx(-1 + RANGE_MOMENTUM * -10)
    assert quantizer.high.item() == pytest.approx(2 + RANGE_MOMENTUM * 3)
    expected = scale_and_zero_point(quantizer.low, quantizer.high, ACTIVATION)
    assert torch.equal(quantizer.scale, expected[0])
    assert torch.equal(quantizer.zero_point, expected[1])


def test_training_without_calibration_starts_with_the_first_batch():
    quantizer = activation().train()
    quantizer(torch.tensor([-1.0, 3.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1, 3)


def test_a_range_that_is_not_observed_stays_in_training():
    quantizer = calibrated(activation()).train()
    quantizer.set_observing(False)
    before = quantizer.scale.clone()
    quantizer(torch.randn(10) * 100)
    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize("on", [True, False])
def test_the_observing_flag_survives_state_dict_and_copy(on):
    quantizer = calibrated(activation())
    quantizer.set_observing(on)
    loaded = activation()
    loaded.load_state_dict(quantizer.state_dict())
    for other in (loaded, copy.deepcopy(quantizer)):
        assert bool(other.observing) is on
        before = other.scale.clone()
        other.train()(torch.randn(10) * 100)
        assert torch.equal(other.scale, before) is not on


def test_loading_an_unset_range_asks_for_calibration_again():
    quantizer = calibrated(activation(ranges="learned"))
    quantizer.load_state_dict(activation(ranges="learned").state_dict())
    with pytest.raises(CalibrationError, match="no range yet"):
        quantizer.eval()(torch.randn(3))


def test_a_weights_range_follows_the_present_weight():
    quantizer, x = weight(), torch.randn(3, 20)
    for training in (True, False):
        quantizer.train(training)
        for present in (x, x * 3):
            scale, zero_point = scale_and_zero_point(*present.aminmax(dim=1), PER_CHANNEL)
            assert torch.equal(quantizer(present), fake_quantize(present, scale, zero_point, PER_CHANNEL))
            assert torch.equal(quantizer.used_scale(present), scale)
            if training:
                assert torch.equal(quantizer.scale, scale)


def test_eval_does_not_store_a_weights_range():
    quantizer = calibrated(weight(), torch.randn(3, 20)).eval()
    before = quantizer.scale.clone()
    quantizer(torch.randn(3, 20) * 9)
    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize("observer", ["mse", "percentile", "entropy"])
def test_a_weights_searched_range_stays(observer):
    quantizer, x = weight(observer=observer), torch.randn(3, 200)
    calibrated(quantizer, x).train()
    before = quantizer.scale.clone()
    quantizer(x * 5)
    assert torch.equal(quantizer.scale, before)


def test_a_weight_is_quantized_while_activations_calibrate():
    quantizer, x = weight(observer="mse"), torch.randn(3, 200)
    quantizer.start_calibration()
    seen = quantizer(x)
    assert not torch.equal(seen, x)
    assert torch.equal(quantizer(x), seen)
    quantizer.finish_calibration()
    assert torch.equal(quantizer.eval()(x), seen)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_calibrating_again_sees_the_present_tensor(ranges, observer):
    for quantizer in (weight(observer=observer, ranges=ranges), activation(observer=observer, ranges=ranges)):
        x = torch.randn(3, 200)
        once = calibrated(quantizer, x).scale.clone()
        again = calibrated(quantizer, x * 4).scale.clone()
        torch.testing.assert_close(again, once * 4, rtol=1e-3, atol=0)


def test_a_learned_scale_is_trained_towards_less_error():
    x = torch.randn(1000)
    quantizer = calibrated(
        Quantizer(Scheme(bits=3, signed=True, symmetric=True), ranges="learned", observer="minmax"), x
    ).train()
    start = (quantizer(x) - x).square().mean().item()
    optimizer = torch.optim.SGD([quantizer.scale], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean().item() < 0.6 * start


def test_a_learned_scale_that_crosses_zero_is_reflected():
    quantizer, x = calibrated(activation(ranges="learned")).train(), torch.linspace(-1, 2, 50)
    quantizer(x).sum().backward()
    expected, gradient = quantizer(x).detach(), quantizer.scale.grad.clone()
    with torch.no_grad():
        quantizer.scale.neg_()
    quantizer.scale.grad = None
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(y.detach(), expected)
    assert torch.equal(quantizer.scale.grad, -gradient)
    assert quantizer.used_scale(x) > 0


def test_a_learned_scale_of_zero_is_finite_and_finds_back():
    quantizer, x = calibrated(activation(ranges="learned")).train(), torch.linspace(0, 2, 50)
    with torch.no_grad():
        quantizer.scale.zero_()
    y = quantizer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(quantizer.scale.grad)
    assert quantizer.scale.grad != 0


def test_the_gradient_factor_is_lsqs():
    features, batch = 20, 8
    x = torch.randn(batch, features)
    quantizer = calibrated(activation(ranges="learned"), x).train()
    quantizer(x).sum().backward()
    scale = quantizer.scale.detach().clone().requires_grad_()
    fake_quantize(x, snap(scale.detach()).requires_grad_(), quantizer.zero_point, ACTIVATION)
    fake_quantize(x, scale, quantizer.zero_point, ACTIVATION).sum().backward()
    assert quantizer.scale.grad.item() == pytest.approx(scale.grad.item() * (features * 255) ** -0.5, rel=1e-4)
    w = torch.randn(3, 40)
    quantizer = calibrated(weight(ranges="learned"), w).train()
    quantizer(w).sum().backward()
    scale = quantizer.scale.detach().clone().requires_grad_()
    fake_quantize(w, scale, quantizer.zero_point, PER_CHANNEL).sum().backward()
    torch.testing.assert_close(quantizer.scale.grad, scale.grad * (40 * 127) ** -0.5, rtol=1e-4, atol=1e-6)


def test_a_known_range_is_fixed():
    quantizer = Quantizer(Scheme(symmetric=True))
    quantizer.fix_range((0.0, 1.0))
    assert quantizer.scale.item() == pytest.approx(1 / 255, rel=2e-5)
    assert quantizer.state.fixed
    quantizer.set_observing(True)
    before = quantizer.scale.clone()
    quantizer.train()(torch.rand(10) * 50)
    assert torch.equal(quantizer.scale, before)
    free = Quantizer(Scheme(symmetric=True))
    free.fix_range(None)
    assert not free.state.fixed
    assert torch.isnan(free.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_data_names_the_tensor(bad):
    x = torch.tensor([1.0, bad])
    quantizer = activation()
    quantizer.name = "features.3.relu"
    quantizer.start_calibration()
    with pytest.raises(CalibrationError, match=r"features\.3\.relu.*NaN or infinite"):
        quantizer(x)
    quantizer = calibrated(activation()).train()
    quantizer.name = "features.3.relu"
    before = quantizer.scale.clone()
    with pytest.raises(CalibrationError, match=r"features\.3\.relu.*NaN or infinite"):
        quantizer(x)
    assert torch.equal(quantizer.scale, before)
    with pytest.raises(CalibrationError, match="not finite"):
        quantizer.set_range(torch.tensor(0.0), torch.tensor(bad))


def test_nothing_seen_names_the_tensor():
    quantizer = activation()
    quantizer.name = "head.relu"
    quantizer.start_calibration()
    with pytest.raises(CalibrationError, match=r"head\.relu: no batch"):
        quantizer.finish_calibration()


def test_float_mode_passes_through_even_without_a_range():
    model = nn.Sequential(activation(), nn.ReLU(), activation(ranges="learned"))
    assert list(quantizers(model)) == ["0", "2"]
    set_mode(model, Mode.FLOAT)
    x = torch.randn(5)
    assert torch.equal(model(x), x.relu())


def test_set_observing_reaches_all_that_can_observe():
    model = nn.ModuleList([activation(), activation(ranges="learned"), weight(), weight(observer="mse")])
    set_observing(model, False)
    assert [bool(q.observing) for q in model] == [False] * 4
    set_observing(model, True)
    assert [bool(q.observing) for q in model] == [True, False, True, False]


def test_a_learned_range_keeps_its_dtype_and_gradient_under_autocast():
    quantizer = calibrated(activation(ranges="learned")).train()
    x = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(x)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert x.grad.dtype is torch.bfloat16
    assert quantizer.scale.grad.dtype is torch.float32


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_the_state_follows_from_what_happens_to_the_range(ranges):
    moves = ranges == "observed"
    quantizer = activation(ranges=ranges)
    assert quantizer.state is (RangeState.STARTING if moves else RangeState.UNSET)
    quantizer.set_observing(False)
    assert quantizer.state is RangeState.UNSET
    quantizer.set_observing(True)
    calibrated(quantizer)
    assert quantizer.state is (RangeState.OBSERVING if moves else RangeState.CALIBRATED)
    assert int(quantizer.observing) == moves
    quantizer.set_observing(False)
    assert quantizer.state is RangeState.CALIBRATED
    quantizer.fix()
    quantizer.set_observing(True)
    assert quantizer.state is RangeState.FIXED
    assert int(quantizer.observing) == 2


@pytest.mark.parametrize("state", list(RangeState))
def test_a_file_restores_every_state(state):
    saved = activation()
    if state.has_range:
        calibrated(saved)
    saved.set_observing(state.observing)
    if state.fixed:
        saved.fix()
    assert saved.state is state
    loaded = activation()
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state is state


def test_a_fixed_range_stays_fixed_under_a_file_that_only_says_that_it_is_not_observed():
    saved = calibrated(activation(), torch.tensor([0.0, 1.0]))
    saved.set_observing(False)
    known = activation()
    known.fix_range((0.0, 1.0))
    known.load_state_dict(saved.state_dict())
    assert known.state is RangeState.FIXED


def test_a_learned_scale_that_is_fixed_is_the_buffer_in_use():
    quantizer, x = calibrated(activation(ranges="learned", domain="log")), torch.linspace(-1, 2, 50)
    expected = quantizer(x).detach()
    quantizer.fix()
    assert list(quantizer.parameters()) == []
    assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize(("learned", "used"), [(2.7, 3), (-9.4, 0), (300.0, 255)])
def test_a_learned_zero_point_that_is_fixed_is_the_integer_in_use(learned, used):
    quantizer = calibrated(activation(ranges="learned", learns_zero_point=True))
    with torch.no_grad():
        quantizer.zero_point.fill_(learned)
    x = torch.linspace(-1, 2, 50)
    expected = quantizer(x).detach()
    quantizer.fix()
    assert list(quantizer.parameters()) == []
    assert quantizer.zero_point.dtype == torch.int32
    assert int(quantizer.zero_point) == used
    assert torch.equal(quantizer(x), expected)
