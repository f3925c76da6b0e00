"""Cross-layer equalization: equal ranges, and a float function that stays."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import halfeven as he
from halfeven.errors import AlgorithmError
from halfeven.layerwise.float_equivalence import example_outputs
from halfeven.ptq.equalization import cross_layer as equalization
from halfeven.ptq.equalization.cross_layer import (
    equalize,
    equalizing_factors,
    find_chains,
    unclip_relu6,
    unclipping_sqnr,
)
from halfeven.ptq.equalization.layer_pairs import (
    apply_to_constant,
    input_ranges,
    output_ranges,
    rewritable_layers,
    weight_by_channel,
)
from halfeven.quantization.model_quantizers import set_mode
from halfeven.quantization.quantizer import Mode
from nets import IMAGE, NETS, prepared, uneven


@given(st.lists(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), min_size=2, max_size=5))
def test_factors_make_all_ranges_the_geometric_mean(ranges):
    r = torch.tensor(ranges, dtype=torch.float64)
    factors = equalizing_factors(list(r))
    ones = torch.ones(1, r.shape[1], dtype=torch.float64)
    after = r / torch.cat([factors, ones]) * torch.cat([ones, factors])
    torch.testing.assert_close(after, r.log().mean(0).exp().expand_as(r))


def test_factors_of_a_pair_and_of_a_triple():
    """White paper, equation 30; and the cube root of a depthwise triple."""
    r1, r2, r3 = torch.tensor([[8.0, 1.0], [2.0, 9.0], [4.0, 3.0]])
    torch.testing.assert_close(equalizing_factors([r1, r2])[0], (r1 / r2).sqrt().double())
    g = (r1 * r2 * r3).double() ** (1 / 3)
    torch.testing.assert_close(equalizing_factors([r1, r2, r3]), torch.stack([r1 / g, g / r3]))


@pytest.mark.parametrize("bad", [0.0, 1e-12, float("inf"), float("nan")])
def test_channels_that_are_dead_or_not_finite_keep_their_scale(bad):
    factors = equalizing_factors([torch.tensor([4.0, bad, 1.0]), torch.tensor([1.0, 2.0, bad])])
    torch.testing.assert_close(factors, torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.Conv1d(6, 4, 3, bias=False),
    ],
)  # fmt: skip
def test_a_weight_by_channel_is_the_layers_own(layer):
    """Constant inputs give what the layer gives away from borders: for the transposed one, in the middle."""
    values = torch.randn(6)
    x = values.reshape(1, -1, *(1,) * (layer.weight.ndim - 2)).expand(2, -1, *(7,) * (layer.weight.ndim - 2))
    result = layer(x)
    middle = (..., *(result.shape[-1] // 2,) * (layer.weight.ndim - 2))
    torch.testing.assert_close(apply_to_constant(weight_by_channel(layer), values), result[middle][0])
    weight_by_channel(layer).detach().zero_()
    assert not layer.weight.any()


def test_a_linear_weight_by_channel_of_flattened_inputs():
    layer = nn.Linear(12, 5, bias=False)
    weight = weight_by_channel(layer, inputs=4)
    assert weight.shape == (1, 5, 4, 3)
    values = torch.randn(4)
    torch.testing.assert_close(apply_to_constant(weight, values), layer(values.repeat_interleave(3)))


@pytest.mark.parametrize("name", NETS)
def test_chains_are_equalized_and_the_function_stays(name):
    build, shape, chains = NETS[name]
    qmodel = prepared(uneven(build()), shape)
    expected = example_outputs(qmodel)
    report = equalize(qmodel)
    assert sorted(report.chains) == sorted(chains)
    for found, e in zip(example_outputs(qmodel), expected, strict=True):
        assert (found - e).abs().max() <= 1e-5 * e.abs().max()
    for chain in find_chains(rewritable_layers(qmodel)[0]):
        first, *rest = chain.layers
        first = output_ranges(weight_by_channel(first))
        for other in (input_ranges(weight_by_channel(layer, len(first))) for layer in rest):
            torch.testing.assert_close(other, first, rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net[2]])
def test_chains_converge_and_say_so(name):
    build, shape, _ = NETS[name]
    qmodel = prepared(uneven(build()), shape)
    report = equalize(qmodel)
    assert report.converged
    assert equalize(qmodel).sweeps == 1
    once = equalize(prepared(uneven(build()), shape), max_sweeps=1)
    assert once.sweeps == 1
    assert not once.converged


def test_the_factors_are_those_of_the_paper():
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[8.0, -1.0], [0.5, 0.25]])[..., None, None])
        first.bias.copy_(torch.tensor([4.0, 1.0]))
        second.weight.copy_(torch.tensor([[2.0, -8.0]])[..., None, None])
    qmodel = prepared(nn.Sequential(first, nn.ReLU(), second).eval(), (2, 2, 4, 4))
    report = equalize(qmodel)
    a, b = qmodel.get_submodule("0"), qmodel.get_submodule("2")
    torch.testing.assert_close(a.weight.flatten(), torch.tensor([4.0, -0.5, 2.0, 1.0]))
    torch.testing.assert_close(a.bias, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(b.weight.flatten(), torch.tensor([4.0, -2.0]))
    assert report.spread["0"] == (16.0, 2.0)


def test_statistics_of_batchnorm_follow():
    qmodel = prepared(uneven(NETS["depthwise"][0]()))
    layers = [qmodel.get_submodule(name) for name in ("0", "3")]
    before = [(layer.bias.detach().clone(), layer.output_mean, layer.output_std) for layer in layers]
    equalize(qmodel)
    for layer, (bias, mean, std) in zip(layers, before, strict=True):
        factor = bias / layer.bias.detach()
        assert (factor - 1).abs().max() > 0.1
        for found, expected in zip((layer.output_mean, layer.output_std), (mean, std), strict=True):
            torch.testing.assert_close(found * factor, expected)


def test_a_dead_channel_stays_and_spoils_nothing():
    model = uneven(NETS["conv"][0]())
    with torch.no_grad():
        model[0].weight[3] = 0
        model[2].weight[:, 5] = 0
        bias = model[0].bias.clone()
    qmodel = prepared(model)
    report = equalize(qmodel)
    layer = qmodel.get_submodule("0")
    assert torch.isfinite(layer.weight).all()
    assert torch.equal(layer.bias[[3, 5]], bias[[3, 5]])
    assert report.spread["0"][1] < float("inf")


def test_layers_that_cannot_take_part_are_named():
    report = equalize(prepared(uneven(NETS["shared"][0]()), (4, 5)))
    text = str(report)
    assert "twice (called more than once)" in text
    assert "linear (called as a function)" in text
    assert "(its weight is tied to another's)" in text
    assert "first -> second" in text
    assert "set again" in text
    assert "nothing was changed" in str(equalize(prepared(Shifted(), (2, 4))))


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + 1


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_calibrated_ranges_stay(training):
    qmodel = prepared(uneven(NETS["linear"][0]()), (4, 5))
    he.calibrate(qmodel, [torch.randn(4, 5)])
    qmodel.train(training)
    set_mode(qmodel, Mode.CALIBRATE)
    modes = [(module.training, getattr(module, "mode", None)) for module in qmodel.modules()]
    ranges = {name: value.clone() for name, value in qmodel.state_dict().items() if "quantizer" in name}
    equalize(qmodel)
    assert [(module.training, getattr(module, "mode", None)) for module in qmodel.modules()] == modes
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in ranges.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in qmodel.parameters())


def test_a_changed_function_is_an_error_and_is_undone(monkeypatch):
    qmodel = prepared(uneven(NETS["depthwise"][0]()))
    before = copy.deepcopy(qmodel.state_dict())
    mean = qmodel.get_submodule("0").output_mean
    monkeypatch.setattr(equalization, "multiply_inputs", lambda layer, factor: None)
    with pytest.raises(AlgorithmError, match="Equalization changed the outputs of the float model"):
        equalize(qmodel)
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items() if "quant" not in name)
    assert qmodel.get_submodule("0").output_mean is mean


class HardSwish(nn.Module):
    """A ReLU6 that is no activation of its own, beside one that is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.act = nn.ReLU6()

    def forward(self, x):
        x = self.act(self.a(x))
        x = self.b(x)
        return self.c(x * self.act(x + 3) / 6)


def test_relu6_is_replaced_where_it_separates_layers_and_nowhere_else(tmp_path):
    qmodel = prepared(uneven(HardSwish()))
    assert equalize(qmodel).chains == ()
    assert unclip_relu6(qmodel) == ("act.hardtanh",)
    assert equalize(qmodel).chains == (("a", "b"),)
    assert he.plan_of(qmodel).changes.unclipped == ("act.hardtanh",)
    assert unclip_relu6(qmodel) == ()
    he.calibrate(qmodel, [x := torch.randn(IMAGE)]).eval()
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", HardSwish(), torch.randn(IMAGE))
    assert torch.equal(loaded(x), qmodel(x))


def clipped_net(mean, std):
    """conv, BatchNorm of such a distribution, ReLU6, conv."""
    norm = nn.BatchNorm2d(8)
    nn.init.constant_(norm.bias, mean)
    nn.init.constant_(norm.weight, std)
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 3.0), (4.0, 1.0), (-1.0, 2.5)])
def test_what_a_bound_does_is_known_from_batchnorm(mean, std):
    x = mean + std * torch.randn(1_000_000)
    expected = 10 * torch.log10(x.clamp(0, 6).square().sum() / (x - 6).clamp(min=0).square().sum())
    found = unclipping_sqnr(prepared(clipped_net(mean, std)))
    assert found == {"2.hardtanh": pytest.approx(float(expected), abs=0.3)}


def test_only_bounds_that_do_little_are_taken_away_where_a_least_is_given():
    harmful, harmless = (prepared(clipped_net(mean, 1.0)) for mean in (6.0, 0.0))
    assert unclip_relu6(harmful, least_sqnr=30.0) == ()
    assert he.plan_of(harmful).changes.unclipped == ()
    assert unclip_relu6(harmless, least_sqnr=30.0) == ("2.hardtanh",)
    assert unclip_relu6(harmful) == ("2.hardtanh",)


def test_equalized_models_run_on_the_real_runtime(tmp_path):
    model = uneven(
        nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )
    )  # fmt: skip
    qmodel = prepared(model, per_channel=False)
    unclip_relu6(qmodel)
    assert ("0", "3", "6") in equalize(qmodel).chains
    he.calibrate(qmodel, [torch.randn(16, 3, 8, 8)])
    he.export(qmodel.eval(), tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", [torch.randn(4, 3, 8, 8)], timed=False)
    assert report.weights_match
    assert report.integer_match == 1
    assert report.integer_layers == report.quantizable_layers == 4


def test_equalization_undoes_a_bad_scaling_of_channels():
    """Channels that one layer makes large and the next small again spoil per-tensor weights, and nothing else."""
    even = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    model, x = copy.deepcopy(even), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        factor = torch.logspace(-2, 2, 16).reshape(-1, 1, 1, 1)
        model[0].weight *= factor
        model[0].bias *= factor.flatten()
        model[2].weight /= factor.reshape(1, -1, 1, 1)

    @torch.no_grad()
    def noise(model, steps=()):
        qmodel = prepared(model, per_channel=False)
        for step in steps:
            step(qmodel)
        he.calibrate(qmodel, [x]).eval()
        return float((qmodel(x) - model(x)).square().mean())

    assert noise(model) > 100 * noise(even)
    assert noise(model, [equalize]) < 2 * noise(even)
