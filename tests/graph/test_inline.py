"""Blocks inside of forward: without gradients, in mixed precision, and sizes by len."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.graph.capture import capture

pytestmark = pytest.mark.usefixtures("unfused")

X = torch.randn(3, 3, 8, 8)


def backbone():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = backbone(), nn.Linear(4, 2)

    def features(self, x):
        return self.backbone(x)

    def forward(self, x):
        return self.head(self.features(x).float().mean((2, 3)))


class NoGrad(Net):
    def features(self, x):
        with torch.no_grad():
            return self.backbone(x)


class Decorated(Net):
    @torch.no_grad()
    def features(self, x):
        return self.backbone(x)


class Nested(Net):
    """Gradients for the second half of a block without: the first convolution alone is frozen."""

    def features(self, x):
        with torch.no_grad():
            x = self.backbone[0](x)
            with torch.enable_grad():
                x = self.backbone[1:](x)
        return x


class Twice(Net):
    """Two blocks, of which the first result is used inside and outside."""

    def features(self, x):
        with torch.no_grad():
            x = self.backbone[0](x)
        y = self.backbone[1:3](x)
        with torch.no_grad():
            z = self.backbone[3:](y)
        return z + y[:, :, 1:-1, 1:-1] + x[:, :, 1:-1, 1:-1]


def gradients(model):
    model = model.eval()
    model.zero_grad()
    model(X).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [NoGrad, Decorated, Nested, Twice])
def test_a_block_without_gradients_is_captured_whole_and_trains_as_in_float(build):
    model = build().eval()
    captured, report = capture(model, X)
    assert report.regions == [""], report.left
    expected = gradients(model)
    found = gradients(captured)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "backbone.0.weight" not in found


class Autocast(Net):
    def features(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.backbone(x)


class Cast(Net):
    """Conversions of its own, and a block that switches mixed precision off."""

    def features(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.backbone[:3](x.to(torch.bfloat16)).bfloat16()
            with torch.autocast("cpu", enabled=False):
                return self.backbone[3:](x.float())


class DecoratedAutocast(Net):
    @torch.autocast("cpu", torch.bfloat16)
    def features(self, x):
        return self.backbone(x)


@pytest.mark.parametrize("build", [Autocast, Cast, DecoratedAutocast])
def test_a_block_in_mixed_precision_is_captured_whole_in_float32_and_the_plan_says_so(build):
    model = build().eval()
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    qmodel = he.prepare(model, X)
    (note,) = [note for note in he.plan_of(qmodel).notes if "mixed precision" in note]
    assert "test_inline.py" in note
    assert note.count("(bfloat16)") == 1
    assert not any("Stays Python" in note for note in he.plan_of(qmodel).notes)
    captured, _ = capture(model, X)
    assert torch.equal(captured(X), plain(X))
    with torch.autocast("cpu", torch.bfloat16):  # around the call too
        again, _ = capture(model, X)
    assert torch.equal(again(X), plain(X))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(X).dtype == (torch.float32 if build is Cast else torch.bfloat16)


def test_an_autocast_model_is_deployed(tmp_path):
    model = Autocast().eval()
    qmodel = he.calibrate(he.prepare(model, X, scheme="w7a8"), [X]).eval()
    he.export(qmodel, tmp_path / "m.xml")
    assert he.verify(qmodel, tmp_path / "m.xml", [X], timed=False).integer_match == 1


def test_a_block_that_is_off_is_not_reported():
    class Off(Net):
        def features(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.backbone(x)

    _, report = capture(Off().eval(), X)
    assert not report.in_float32
    assert report.regions == [""]


def test_len_leaves_the_batch_free():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 2, 1), nn.Linear(128, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.out(y.view(len(y), -1)) + torch.ones(len(x), 2)

    model = Flat().eval()
    captured, _ = capture(model, X)
    for size in (1, 2, 7):
        x = torch.randn(size, 3, 8, 8)
        assert torch.equal(captured(x), model(x))


def test_one_tensor_given_twice_is_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.a(x) - self.b(y)

    model = Two().eval()
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    captured, _ = capture(model, (x, x))
    assert torch.equal(captured(x, y), model(x, y))


class Inference(Net):
    @torch.inference_mode()
    def features(self, x):
        return self.backbone(x)


def test_a_block_in_inference_mode_is_captured_as_one_without_gradients():
    captured, report = capture(Inference().eval(), X)
    assert report.regions == [""]
    assert not report.kept
    captured.train()(X).sum().backward()
    assert captured.head.weight.grad is not None
    assert captured.backbone[0].weight.grad is None
    assert torch.is_inference_mode_enabled() is False
