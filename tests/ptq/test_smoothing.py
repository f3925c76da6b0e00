"""Smoothing and reparametrization: the float function stays, and the outliers go where they were sent."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import AlgorithmError, CalibrationError, ConfigError
from halfeven.layerwise.float_equivalence import example_outputs, float_function
from halfeven.layerwise.sqnr import relative_difference, sqnr
from halfeven.placement.insertion import plan_of
from halfeven.ptq.transformers import reparametrization, smoothing
from halfeven.ptq.transformers.reparametrization import reparametrize, to_common_range
from halfeven.ptq.transformers.smoothing import smooth, smoothing_factors
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode
from runtimes.parity import SCHEME
from sweeps import crossed, sweep

WIDTH = 16
METHODS = {"smooth": smooth, "reparametrize": reparametrize}


class Block(nn.Module):
    """A transformer's block with LayerNorm first; query, key and value are layers of their own."""

    def __init__(self, bias=True, offset=True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=offset), nn.LayerNorm(WIDTH, bias=offset)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 32, bias=bias), nn.Linear(32, WIDTH)

    def forward(self, x):
        y = self.norm1(x)
        heads = [layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, WIDTH), nn.Sequential(Block(**options), Block(**options))
        self.norm, self.drop, self.head = nn.LayerNorm(WIDTH), nn.Dropout(0.0), nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.blocks(self.stem(x))).mean(1)))


def with_outliers(model):
    """Some channels after each LayerNorm are large or far from zero, and meet small weights: as in trained
    transformers."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == WIDTH:
            module.weight.data[:, [2, 5, 7]] /= torch.tensor([30.0, 25.0, 12.0])
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            module.weight.data[2] = 30.0
            module.weight.data[7] = -12.0
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 1)
                module.bias.data[5] = 25.0
    return model.eval()


def data(count=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 7, 8, generator=generator) for _ in range(count)]


def prepared(model=None, **options):
    return he.prepare(model or with_outliers(Net()), data()[0], **{"batchnorm": "fold", "scheme": SCHEME} | options)


def after_norms(qmodel):
    """What each LayerNorm puts out in the float model, [elements, channels]."""
    seen = {}
    norms = {name: m for name, m in qmodel.named_modules() if isinstance(m, nn.LayerNorm)}
    hooks = [
        m.register_forward_hook(lambda *a, name=name: seen.setdefault(name, []).append(a[2].flatten(0, -2)))
        for name, m in norms.items()
    ]
    with torch.no_grad(), float_function(qmodel):
        for batch in data():
            qmodel(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


# The mathematics


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_factors_share_the_difficulty(strength):
    x, w = torch.rand(50) * 100 + 0.1, torch.rand(50) + 0.01
    r = smoothing_factors(x, w, strength)
    # The product of both ranges stays; the strength says how much of its variation is left to the weights.
    left = (x / r).log()
    torch.testing.assert_close(left, (1 - strength) * (x.double() * w).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((w * r).log(), strength * (x.double() * w).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e-12])
def test_dead_channels_keep_their_scale(bad):
    x, w = torch.rand(5) + 1, torch.rand(5) + 1
    x[1], w[3] = bad, bad
    r = smoothing_factors(x, w, 0.5)
    assert r[1] == r[3] == 1
    assert torch.isfinite(r).all()
    r, c = to_common_range(-x, x)
    assert (r[1], c[1]) == (1, 0)
    assert torch.isfinite(r).all()


def test_all_channels_get_one_range_with_zero_in_it():
    low = torch.randn(40).double() * 3 - 1
    high = low + torch.rand(40).double() * 20 + 0.1
    r, c = to_common_range(low, high)
    lows, highs = (low - c) / r, (high - c) / r
    torch.testing.assert_close(lows, lows[:1].expand(40))
    torch.testing.assert_close(highs, highs[:1].expand(40))
    assert lows[0] <= 0 <= highs[0]
    assert (highs - lows)[0].item() == pytest.approx((high - low).mean().item())
    far = to_common_range(low + 100, high + 100)
    assert ((low + 100 - far[1]) / far[0]).abs().max() < 1e-4  # the common range starts at zero


def test_these_are_the_means_of_scales_and_zero_points():
    """RepQ-ViT's own words: per-channel (s, z) become s~ = mean s, z~ = mean z."""
    low, high = -torch.rand(30).double() - 0.1, torch.rand(30).double() + 0.1
    s, z = (high - low) / 255, -low / ((high - low) / 255)
    r1, r2 = s / s.mean(), z - z.mean()
    r, c = to_common_range(low, high)
    torch.testing.assert_close(r, r1)
    torch.testing.assert_close(c, -s * r2)


def test_no_channel_lives():
    r, c = to_common_range(torch.zeros(3), torch.zeros(3))
    assert r.tolist() == [1, 1, 1]
    assert c.tolist() == [0, 0, 0]


# On models


@pytest.mark.parametrize(
    ("method", "options", "calibrated"),
    crossed(sorted(METHODS), [({}, False), ({}, True), ({"bias": False}, False), ({"offset": False}, False)]),
)
def test_the_float_function_stays(method, options, calibrated):
    qmodel = prepared(with_outliers(Net(**options)))
    if calibrated:
        he.calibrate(qmodel, data())
    modes = [q.mode for q in quantizers(qmodel).values()]
    expected, weight = example_outputs(qmodel), qmodel.get_submodule("head").weight.clone()
    qmodel.train()
    report = METHODS[method](qmodel, data())
    assert qmodel.training
    assert [q.mode for q in quantizers(qmodel).values()] == modes
    assert not torch.equal(qmodel.get_submodule("head").weight, weight)
    assert relative_difference(example_outputs(qmodel)[0], expected[0]) < 1e-5
    assert len(report.spread) == 5
    assert report.left == ()
    assert report.readers["blocks.0.norm1"] == ("blocks.0.query", "blocks.0.key", "blocks.0.value")
    assert report.readers["norm"] == ("head",)
    assert "blocks.1.norm2 -> blocks.1.up:" in str(report)


def test_smoothing_balances_activations_and_weights():
    qmodel = prepared()
    smooth(qmodel, data(), strength=0.5)
    for name, (x, readers) in {
        "blocks.0.norm2": (after_norms(qmodel)["blocks.0.norm2"], ["blocks.0.up"]),
        "blocks.1.norm1": (after_norms(qmodel)["blocks.1.norm1"], ["blocks.1.query", "blocks.1.key", "blocks.1.value"]),
    }.items():
        weights = torch.stack([qmodel.get_submodule(reader).weight.abs().amax(0) for reader in readers]).amax(0)
        torch.testing.assert_close(x.abs().amax(0), weights, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_reparametrized_channels_have_one_range(bias):
    qmodel = prepared(with_outliers(Net(bias=bias)))
    report = reparametrize(qmodel, data(), observer="minmax")
    for name, x in after_norms(qmodel).items():
        low, high = x.amin(0), x.amax(0)
        torch.testing.assert_close(high - low, (high - low).mean().expand(WIDTH), rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(low, low.mean().expand(WIDTH), rtol=1e-3, atol=1e-3, msg=name)
        assert report.spread[name][0] > 3
        assert report.spread[name][1] == pytest.approx(1)


def test_without_an_offset_the_channels_are_even_about_zero():
    qmodel = prepared(with_outliers(Net(offset=False)))
    reparametrize(qmodel, data(), observer="minmax")
    x = after_norms(qmodel)["blocks.0.norm1"].abs().amax(0)
    torch.testing.assert_close(x, x.mean().expand(WIDTH), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_integers_serve_a_model_with_outliers_better(method):
    model = with_outliers(Net())
    plain = prepared(model, activation_observer="minmax")
    better = copy.deepcopy(plain)
    METHODS[method](better, data())
    ratios = []
    for qmodel in (plain, better):
        he.calibrate(qmodel, data()).eval()
        with torch.no_grad():
            ratios.append(sqnr([qmodel(x) for x in data()], [model(x) for x in data()]))
    assert ratios[1] > ratios[0] + 6  # as much as a bit


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_checkpoint_loads(method, tmp_path):
    model = with_outliers(Net(bias=False))
    qmodel = prepared(copy.deepcopy(model))
    METHODS[method](qmodel, data())
    he.calibrate(qmodel, data()).eval()
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", model, data()[0])
    assert torch.equal(loaded(data()[0]), qmodel(data()[0]))
    given = plan_of(loaded).changes.given_biases
    assert ("blocks.0.query" in given) == (method == "reparametrize")


@pytest.mark.parametrize("method", sweep(sorted(METHODS), "reparametrize"))
def test_the_deployed_file_computes_it(method, tmp_path):
    qmodel = prepared()
    METHODS[method](qmodel, data())
    he.calibrate(qmodel, data()).eval()
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), data(), timed=False)
    assert report.weights_match
    assert report.integer_layers == report.quantizable_layers == 14
    assert all(tensor.different_alone <= 2e-3 * tensor.count for tensor in report.tensors)


class Last(nn.Module):
    """A transformer's block with LayerNorm last: the residual stream reads what the LayerNorm puts out."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.norm1(x)
        return self.head(self.norm2(self.down(F.gelu(self.up(x))) + x))


def last():
    generator = torch.Generator().manual_seed(6)
    batches = [torch.randn(6, 7, WIDTH, generator=generator) for _ in range(3)]
    model = with_outliers(Last())
    return model, he.prepare(copy.deepcopy(model), batches[0], scheme=SCHEME, activation_observer="minmax"), batches


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_residual_stream_is_given_what_it_was(method, tmp_path):
    model, qmodel, batches = last()
    expected = example_outputs(qmodel)
    report = METHODS[method](qmodel, batches)
    assert report.readers == {"norm1": ("up",), "norm2": ("head",)}
    assert relative_difference(example_outputs(qmodel)[0], expected[0]) < 1e-5
    assert plan_of(qmodel).changes.rescaled == ("norm1",)
    reparametrize(smoothed := copy.deepcopy(qmodel), batches)  # on top of it
    assert relative_difference(example_outputs(smoothed)[0], expected[0]) < 1e-5
    he.calibrate(qmodel, batches).eval()
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", model, batches[0])
    assert torch.equal(loaded(batches[1]), qmodel(batches[1]))
    assert "Read by additions through a factor" in str(plan_of(loaded))
    parity = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert parity.integer_layers == parity.quantizable_layers == 3
    assert all(tensor.different_alone <= 2e-3 * tensor.count for tensor in parity.tensors)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_integers_serve_a_residual_stream_better(method):
    model, plain, batches = last()
    better = copy.deepcopy(plain)
    METHODS[method](better, batches)
    ratios = []
    for qmodel in (plain, better):
        he.calibrate(qmodel, batches).eval()
        with torch.no_grad():
            ratios.append(sqnr([qmodel(x) for x in batches], [model(x) for x in batches]))
    assert ratios[1] > ratios[0] + 6


class Windows(nn.Module):
    """Channels stay on the last axis through what shifted windows do to a map."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.roll(F.pad(self.norm(x), (0, 0, 0, 0, 0, 0)), (1, 1), (1, 2))
        x = x.view(-1, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, WIDTH)
        return self.layer(x)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_factors_pass_the_windows_of_an_attention(method):
    batch = torch.randn(3, 4, 4, WIDTH)
    qmodel = he.prepare(with_outliers(Windows()), batch)
    expected = example_outputs(qmodel)
    report = METHODS[method](qmodel, [batch])
    assert report.readers == {"norm": ("layer",)}
    assert relative_difference(example_outputs(qmodel)[0], expected[0]) < 1e-5


class Function(nn.Module):
    """A LayerNorm, a linear layer, and a function of both."""

    def __init__(self, function, other=None):
        super().__init__()
        self.norm, self.layer, self.other = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), other
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def tied(model):
    model.layer.weight = model.other.weight
    return model


LEFT = {
    "norm (read by add)": Function(lambda m, x: m.layer(m.norm(x) + x)),
    "norm (read by mul)": Function(lambda m, x: (y := m.norm(x)) * m.layer(y)),
    "norm (read by output)": Function(lambda m, x: (y := m.norm(x), m.layer(y))),
    "norm (read by transpose)": Function(lambda m, x: m.layer(m.norm(x).transpose(1, 2))),
    "norm (read by gelu)": Function(lambda m, x: m.layer(F.gelu(m.norm(x)))),
    "norm (read by Dropout)": Function(lambda m, x: m.layer(m.other(m.norm(x))), nn.Dropout(0.1)),
    "norm (used more than once)": Function(lambda m, x: m.layer(m.norm(x)) + m.other(m.norm(2 * x)), nn.Linear(16, 16)),
    "norm (read by QuantizedLinear)": tied(
        Function(lambda m, x: m.layer(m.norm(x)) + m.other(x), nn.Linear(WIDTH, WIDTH))
    ),
    "layer_norm (no LayerNorm over the last axis with a factor of its own)": Function(
        lambda m, x: m.layer(F.layer_norm(x, (WIDTH,)))
    ),
}


@pytest.mark.parametrize(("reason", "method"), crossed(sorted(LEFT), sorted(METHODS)))
def test_what_cannot_be_folded_is_left_alone_and_named(reason, method):
    batch = torch.randn(3, WIDTH, WIDTH)
    qmodel = he.prepare(copy.deepcopy(LEFT[reason]), batch)
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    report = METHODS[method](qmodel, [batch])
    assert reason in report.left
    assert not report.spread
    assert "nothing was changed" in str(report)
    assert all(torch.equal(p, before[name]) for name, p in qmodel.named_parameters())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_mistake_is_an_error_and_undone(method, monkeypatch):
    right = smoothing.move_affine

    def wrong(norm, readers, rescaling, r, c):
        right(norm, readers, rescaling, r, c)
        readers[-1].weight[0] += 0.1

    for module in (smoothing, reparametrization):
        monkeypatch.setattr(module, "move_affine", wrong)
    qmodel = prepared()
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    with pytest.raises(AlgorithmError, match="changed the outputs of the float model"):
        METHODS[method](qmodel, data())
    assert all(torch.equal(p, before[name]) for name, p in qmodel.named_parameters())


def test_smoothing_refuses_bad_arguments():
    qmodel = prepared()
    with pytest.raises(AlgorithmError, match=r"strength of 1.5"):
        smooth(qmodel, data(), strength=1.5)
    with pytest.raises(CalibrationError, match="no batch"):
        smooth(qmodel, [])
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        reparametrize(qmodel, [data()[0] * float("nan")])
    with pytest.raises(ConfigError, match="no observer"):
        reparametrize(qmodel, data(), observer="largest")
    assert all(q.mode is Mode.QUANTIZE for q in quantizers(qmodel).values())


def test_only_the_batches_asked_for_are_seen():
    few = prepared()
    all_of_them = copy.deepcopy(few)
    smooth(few, data(), batches=1)
    smooth(all_of_them, data()[:1])
    assert torch.equal(few.get_submodule("blocks.0.up").weight, all_of_them.get_submodule("blocks.0.up").weight)
