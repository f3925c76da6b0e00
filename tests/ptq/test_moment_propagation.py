"""What is known of all tensors without data, against what data show."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfeven.graph.capture import capture
from halfeven.graph.view import tensor_names
from halfeven.ptq.data_free.moment_propagation import InputDistribution, layer_moments, propagated
from halfeven.ptq.data_free.moments import collapsed
from nets import prepared

SAMPLES = 256


def images(shape=(3, 8, 8)):
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(5))


def measured(model, x):
    """The model in eval mode, its BatchNorm statistics those of these inputs, gamma and beta random."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(3):  # each layer's statistics depend on those before
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.reset_running_stats()
            model(x)
    return model.eval()


def seen(model, x):
    """Every tensor's values on data, by name, with what is said to be known of it."""
    region = capture(model, x[:2])[0]
    known = propagated(region)
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Recorder(region).run(x)
    names = {node: name for name, node in tensor_names(region.graph).items()}
    return {names[node]: (known.get(node), values[node]) for node in names}


def assert_moments(found, value, tolerance):
    rows = value.reshape(1, -1) if found.axis is None else value.movedim(found.axis, 0).flatten(1)
    scale = float(rows.std(1).mean())
    torch.testing.assert_close(found.mean.float(), rows.mean(1), atol=tolerance * scale, rtol=tolerance)
    torch.testing.assert_close(found.std.float(), rows.std(1), atol=2 * tolerance * scale, rtol=2 * tolerance)
    assert (found.low.float() <= rows.quantile(0.002, 1) + 1e-5).all()
    assert (found.high.float() >= rows.quantile(0.998, 1) - 1e-5).all()


class Rich(nn.Module):
    """Every kind of operator that a distribution passes, most after a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.up, self.fc, self.last = nn.ConvTranspose2d(24, 6, 3, stride=2), nn.Linear(24, 5), nn.Linear(5, 5)
        self.act = nn.PReLU(8)

    def forward(self, x):
        x = F.relu6(self.norm1(self.one(x)))
        y = self.norm2(self.two(x))
        joined = torch.cat([x, self.act(y), F.silu(y) + x], 1)
        z = self.up(F.avg_pool2d(joined, 1))
        return self.last(F.hardswish(self.fc(joined.mean((2, 3))))), z * 2 - 1


def test_moments_of_all_tensors_are_those_of_the_data():
    x = images()
    found = seen(measured(Rich(), x), x)
    assert all(known is not None for known, _ in found.values())
    for name in ("x", "norm1", "norm2", "relu6"):
        assert_moments(*found[name], 0.04)
    for name in ("act.prelu", "silu", "add", "cat", "avg_pool2d"):  # behind a tensor that is no Gaussian
        assert_moments(*found[name], 0.2)
    means = {name: (known.mean.float(), value) for name, (known, value) in found.items()}
    for name in ("mean", "fc"):  # an average keeps the mean, and a layer is exact in it
        mean, value = means[name]
        torch.testing.assert_close(mean, value.mean(0), atol=0.1, rtol=0.1)
    # The middle of a transposed convolution, all positions of the stride averaged.
    mean, value = means["up"]
    torch.testing.assert_close(mean, value[..., 4:12, 4:12].mean((0, 2, 3)), atol=0.15, rtol=0.1)


def test_what_rests_on_batchnorm_alone_says_so():
    x = images()
    found = seen(measured(Rich(), x), x)
    says = {name: known.measured for name, (known, _) in found.items()}
    assert says["norm1"]
    assert says["silu"]
    assert says["cat"]
    assert says["mean"]
    assert not any(says[name] for name in ("x", "one", "up", "fc", "last"))


def test_folded_models_with_quantizers_know_the_same():
    x = images()
    model = measured(Rich(), x)
    qmodel = prepared(model, x[:2].shape)
    names, known = tensor_names(qmodel.graph), propagated(qmodel)
    plain = seen(model, x)
    for name, plain_name in (("one", "norm1"), ("two", "norm2"), ("silu", "silu"), ("fc", "fc")):
        torch.testing.assert_close(known[names[name]].mean, plain[plain_name][0].mean)
        torch.testing.assert_close(known[names[name]].high, plain[plain_name][0].high)
    assert all(known[node].measured for name, node in names.items() if name.startswith("quantizers.relu6"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, groups=2), (6, 20, 20)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (6, 20, 20)),
        (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (6, 10, 10)),
        (nn.Linear(6, 4), (6,)),
    ],
    ids=["grouped", "depthwise", "transposed", "linear"],
)
def test_moments_of_layers(layer, shape):
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    x = torch.randn(4 * SAMPLES, *shape)
    each = (-1, *(1,) * (len(shape) - 1))
    with torch.no_grad():
        y = layer(x * std.reshape(each) + mean.reshape(each))
    found = layer_moments(layer, mean, std)
    rows = y.movedim(1, 0).flatten(1)
    torch.testing.assert_close(found[0].float(), rows.mean(1), atol=0.03, rtol=0.02)
    if not getattr(layer, "transposed", False):
        torch.testing.assert_close(found[1].float(), rows.std(1), atol=0.03, rtol=0.02)


class Moved(nn.Module):
    """Channels that are flattened, moved to another axis, selected, and added across axes."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.table = nn.Parameter(torch.randn(1, 64, 3))

    def forward(self, x):
        x = self.norm(x)
        tokens = x.flatten(2).transpose(1, 2) + self.table
        return x.flatten(1), self.fc(tokens), x[:, :2], torch.cat([x, x], 2), x / 3, x @ x


def test_channels_that_are_moved_about_become_one():
    x = images()
    model = measured(Moved(), x)
    found = seen(model, x)
    flat, value = found["flatten_1"]
    assert flat.axis == 1
    assert_moments(flat, value, 0.25)
    for name in ("transpose", "slice", "cat"):
        known, value = found[name]
        assert known.axis is None, name
    assert_moments(found["transpose"][0], found["transpose"][1], 0.02)
    assert_moments(found["cat"][0], found["cat"][1], 0.02)
    assert_moments(found["add"][0], found["add"][1], 0.05)
    assert found["fc"][0] is not None
    assert found["div"][0] is None
    assert found["matmul"][0] is None
    assert len(collapsed(flat).mean) == 1


class Misleading(nn.Module):
    """As many columns as channels, a tensor joined with itself, and BatchNorm behind what nothing is known of."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.act = nn.BatchNorm2d(8), nn.Linear(8, 3), nn.PReLU(8)
        self.after, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(x)
        x = self.act(x.transpose(1, 2))
        return self.fc(x), torch.cat([x, x], 1), self.last(self.after(torch.cumsum(x, 1)))


def test_axes_are_not_mistaken():
    x = images((8, 8, 8))
    model = measured(Misleading(), x)
    found = seen(model, x)
    mean, value = found["fc"][0].mean.float(), found["fc"][1]
    torch.testing.assert_close(mean, value.mean((0, 1, 2)), atol=0.1, rtol=0.1)
    assert_moments(found["cat"][0], found["cat"][1], 0.1)
    assert found["cumsum"][0] is found["after"][0] is None
    torch.testing.assert_close(found["last"][0].mean.float(), model.last.bias.detach())


def test_a_tensor_joined_with_itself_has_twice_the_channels():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.norm(x)
            return torch.cat([x, x], 1)

    found, value = seen(measured(Twice(), images()), images())["cat"]
    assert len(found.mean) == 6
    assert_moments(found, value, 0.02)


def test_inputs_as_given():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(8), nn.GroupNorm(2, 4)).eval()
    with torch.no_grad():
        model[2].bias.fill_(3.0)
    region = capture(model, torch.randn(2, 3, 8, 8))[0]
    names = tensor_names(region.graph)
    known = propagated(region, inputs=InputDistribution(mean=0.5, std=0.25, low=0.0, high=1.0))
    found = known[names["input"]]
    assert [float(v) for v in (found.mean, found.std, found.low, found.high)] == [0.5, 0.25, 0.0, 1.0]
    expected = layer_moments(model[0], torch.full((3,), 0.5), torch.full((3,), 0.25))
    torch.testing.assert_close(known[names["0"]].mean, expected[0])
    assert known[names["2"]].mean.tolist() == [3.0] * 4
    assert names["0"] not in propagated(region, inputs=None)
    assert known[names["1"]].axis == 3
