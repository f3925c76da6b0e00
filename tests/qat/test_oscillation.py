"""Oscillations: known sequences of integers, frozen ones that stay, and the pull of the dampening term."""

import math

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.deployment.deployed import deployed_form
from halfeven.errors import CheckpointError, ConfigError
from halfeven.qat.oscillation import OscillationOptions, Oscillations

pytestmark = pytest.mark.usefixtures("fused")

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def prepared(scheme="w4a8", **options):
    torch.manual_seed(0)
    return he.calibrate(he.prepare(nn.Sequential(nn.Linear(6, 3)), X, scheme=scheme, ranges="learned", **options), [X])


def followed(**options):
    qmodel = prepared()
    return qmodel, getattr(qmodel, "0"), Oscillations(qmodel, OscillationOptions(**options))


def put(layer, *integers):
    """Set the first weights of the first channel to integers of the grid."""
    scale = layer.weight_quantizer.used_scale(layer.weight)[0]
    with torch.no_grad():
        layer.weight[0, : len(integers)] = torch.tensor([float(i) for i in integers]) * scale


def state(oscillations, key):
    return oscillations.state_dict()[f"0.{key}"][0]


def test_a_weight_that_turns_back_oscillates_and_one_that_drifts_does_not():
    _, layer, oscillations = followed(momentum=0.5)
    put(layer, 0, 0, 0)
    oscillations = Oscillations(oscillations_model(layer), OscillationOptions(momentum=0.5))
    frequencies = []
    for step in range(4):
        put(layer, (1, 0, 1, 0)[step], step + 1, 0)
        oscillations.after_step(0.0)
        frequencies.append(state(oscillations, "frequency")[:3].tolist())
    assert [f[0] for f in frequencies] == [0.0, 0.5, 0.75, 0.875]
    assert all(f[1:] == [0.0, 0.0] for f in frequencies)
    assert oscillations.shares() == {"oscillating": pytest.approx(100 / 18), "frozen": 0.0}


def oscillations_model(layer):
    model = nn.Module()
    model.add_module("0", layer)
    return model


def test_standing_still_between_two_turns_is_forgotten_by_nobody():
    _, layer, _ = followed()
    put(layer, 0)
    oscillations = Oscillations(oscillations_model(layer), OscillationOptions(momentum=0.5))
    for integer in (1, 1, 1, 0):
        put(layer, integer)
        oscillations.after_step(0.0)
    assert state(oscillations, "frequency")[0] == 0.5


@pytest.mark.usefixtures("unfused")
def test_its_state_follows_the_model_to_another_device():
    qmodel, _, oscillations = followed()
    qmodel.to("meta")
    oscillations.after_step(0.0)
    assert {tensor.device.type for tensor in oscillations.state_dict().values()} == {"meta"}


def test_frozen_integers_stay_while_optimizer_and_scale_move():
    qmodel, layer, oscillations = followed(freeze=True, start=0.0, momentum=0.1, freeze_to=0.2, freeze_from=0.2)
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for step in range(12):
        put(layer, step % 2 + 1)
        oscillations.after_step(0.5)
    frozen = oscillations.state_dict()["0.frozen"]
    assert frozen.sum() == 1
    assert bool(frozen[0, 0])

    def integer():
        (weight,) = [p for n, p in deployed_form(qmodel).named_parameters() if n.endswith("weight")]
        scale = layer.weight_quantizer.used_scale(layer.weight)[0]
        return round(float(weight[0, 0] / scale))

    before, other = integer(), layer.weight[1].detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        qmodel.train()(X).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            layer.weight_quantizer.scale.mul_(1.1)
        oscillations.after_step(0.5)
        assert integer() == before
        scale = layer.weight_quantizer.used_scale(layer.weight)[0]
        torch.testing.assert_close(layer.weight[0, 0], before * scale)
    assert not torch.equal(layer.weight[1], other)
    assert oscillations.shares()["frozen"] >= 100 / 18


def test_the_threshold_falls_by_a_cosine():
    _, _, oscillations = followed(freeze=True, start=0.2, freeze_from=0.1, freeze_to=0.04)
    assert oscillations.threshold(0.1) is None
    assert oscillations.threshold(0.2) == pytest.approx(0.1)
    assert oscillations.threshold(0.6) == pytest.approx(0.07)
    assert oscillations.threshold(1.0) == pytest.approx(0.04)
    assert followed()[2].threshold(0.9) is None


def test_dampening_is_the_squared_distance_to_the_integers():
    _, layer, oscillations = followed(dampening=0.2, start=0.5)
    quantizer = layer.weight_quantizer
    scale = quantizer.used_scale(layer.weight).detach().reshape(-1, 1)
    ratio = layer.weight.detach() / scale
    inside = ratio.clamp(-7, 7)
    expected = ((inside - torch.round(ratio).clamp(-7, 7)) * scale).square().sum() / 3
    term = oscillations.dampening(1.0)
    torch.testing.assert_close(term, 0.2 * expected)
    torch.testing.assert_close(oscillations.dampening(0.75), 0.1 * expected)
    assert oscillations.dampening(0.4) == 0
    term.backward()
    assert quantizer.scale.grad is None
    pull = -layer.weight.grad
    towards = torch.round(ratio).clamp(-7, 7) * scale - inside * scale
    assert bool((torch.sign(pull) == torch.sign(towards))[towards.abs() > 1e-6].all())


def test_dampening_is_a_mean_over_the_outputs_of_transposed_convolutions_too():
    x = torch.randn(2, 2, 5, 5)
    model = nn.Sequential(nn.ConvTranspose2d(2, 6, 2))
    qmodel = he.calibrate(he.prepare(model, x, scheme="w4a8", weight_observer="minmax"), [x])  # nothing is clipped
    quantized = getattr(qmodel, "0")
    oscillations = Oscillations(qmodel, OscillationOptions(dampening=1.0, start=0.0))
    distance = (quantized.weight - quantized.weight_quantizer(quantized.weight)).detach().square().sum()
    torch.testing.assert_close(oscillations.dampening(1.0).detach(), distance / 6)


def test_weights_on_their_integers_are_not_pulled():
    _, layer, oscillations = followed(dampening=1.0, start=0.0)
    with torch.no_grad():
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
    assert oscillations.dampening(1.0) < 1e-12


def test_eight_bits_are_left_alone():
    oscillations = Oscillations(prepared("w8a8"), OscillationOptions(freeze=True, dampening=1.0))
    oscillations.after_step(0.9)
    assert oscillations.shares() == {}
    assert oscillations.dampening(0.9) == 0
    assert str(oscillations.report()) == "0.00 % of the weights oscillate, 0.00 % are frozen"


def test_a_restored_state_goes_on_bit_for_bit():
    def run(oscillations, layer, steps):
        for step in steps:
            put(layer, step % 2, -(step % 3), math.sin(step) * 5)
            oscillations.after_step(step / 10)

    options = {"freeze": True, "start": 0.2, "momentum": 0.1, "freeze_to": 0.2, "freeze_from": 0.3}
    _, first, whole = followed(**options)
    run(whole, first, range(5))
    kept = {key: value.clone() for key, value in whole.state_dict().items()}
    _, second, resumed = followed(**options)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(kept)
    run(whole, first, range(5, 10))
    run(resumed, second, range(5, 10))
    assert bool(whole.state_dict()["0.frozen"].any())
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert torch.equal(first.weight, second.weight)


def test_a_state_of_another_model_is_refused():
    _, _, oscillations = followed()
    with pytest.raises(CheckpointError, match="another model or to other bits"):
        oscillations.load_state_dict({})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"freeze_to": 0.5}, "freeze_to=0.5"),
        ({"start": 1.0}, "start=1.0"),
        ({"freeze": True, "momentum": 0.1, "freeze_to": 0.1}, "below twice the momentum"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        OscillationOptions(**options)


def test_the_report_names_the_worst_layer():
    _, layer, oscillations = followed(momentum=0.5)
    for step in range(4):
        put(layer, step % 2)
        oscillations.after_step(0.0)
    assert str(oscillations.report()).splitlines()[1].startswith("  0: 5.56 % oscillate, 0.00 % are frozen")
