"""Folding BatchNorm into the layer before it."""

import pytest
import torch
from torch import nn

from halfeven.graph.batchnorm import fold, foldable, folding, forget_statistics, kept_statistics
from halfeven.graph.capture import capture
from halfeven.graph.view import Op

LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 6, 3), nn.BatchNorm2d, (2, 3, 7, 7)),
    "conv without bias": (lambda: nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d, (2, 3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d, (2, 6, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), nn.BatchNorm1d, (2, 3, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), nn.BatchNorm3d, (2, 3, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3, 2), nn.BatchNorm2d, (2, 3, 5, 5)),
    "linear": (lambda: nn.Linear(3, 6), nn.BatchNorm1d, (5, 3)),
}


def trained(norm, gamma=None):
    norm.running_mean.normal_(0, 0.5)
    norm.running_var.uniform_(0.1, 3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.num_features) if gamma is None else torch.tensor(gamma))
        norm.bias.normal_()
    return norm


def captured_of(*layers, shape):
    return capture(nn.Sequential(*layers).eval(), torch.randn(shape))[0]


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_fold_computes_the_same(name):
    layer, norm, shape = LAYERS[name]
    torch.manual_seed(0)
    captured = captured_of(layer(), trained(norm(6)), nn.ReLU(), shape=shape)
    x = torch.randn(shape)
    expected = captured(x)
    assert fold(captured) == 1
    torch.testing.assert_close(captured(x), expected, rtol=1e-5, atol=1e-5)
    assert set(captured.state_dict()) == {"0.weight", "0.bias"}
    assert captured.get_submodule("0").bias.requires_grad


def test_gamma_of_zero_and_below():
    norm = trained(nn.BatchNorm2d(6), [0.0, -1.0, 1e-30, -0.0, 2.0, 0.5])
    captured = captured_of(nn.Conv2d(3, 6, 3), norm, shape=(2, 3, 7, 7))
    x = torch.randn(2, 3, 7, 7)
    expected = captured(x)
    assert fold(captured) == 1
    found = captured(x)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 0], norm.bias[0].expand_as(found[:, 0]))


def test_folding_without_affine():
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    factor, bias = folding(norm.eval(), None)
    x = torch.randn(3, 4, 2, 2)
    found = x * factor.float().reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)
    torch.testing.assert_close(found, norm(x), rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    """A convolution that two norms read, one that an addition reads too, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.called_twice, self.alone = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.a, self.b, self.c, self.d = (trained(nn.BatchNorm2d(3)) for _ in range(4))

    def forward(self, x):
        y = self.read_twice(x)
        y = self.a(y) + self.b(y)
        y = self.called_twice(self.c(self.called_twice(y)))
        return self.d(self.alone(y))


def test_what_is_shared_is_not_folded():
    captured, _ = capture(Shared().eval(), torch.randn(2, 3, 5, 5))
    pairs = [(Op(layer).path, Op(norm).path) for layer, norm in foldable(captured.graph)]
    assert pairs == [("alone", "d")]
    x = torch.randn(2, 3, 5, 5)
    expected = captured(x)
    assert fold(captured) == 1
    torch.testing.assert_close(captured(x), expected, rtol=1e-5, atol=1e-5)
    assert "a.weight" in captured.state_dict()
    assert "d.weight" not in captured.state_dict()


def test_a_grouped_transposed_convolution_is_not_folded():
    layers = nn.ConvTranspose2d(4, 6, 3, groups=2), trained(nn.BatchNorm2d(6))
    captured = captured_of(*layers, shape=(2, 4, 5, 5))
    assert fold(captured) == 0


@pytest.mark.parametrize("affine", [True, False])
def test_the_layer_keeps_what_batchnorm_knew_of_its_outputs(affine):
    norm = nn.BatchNorm2d(6, affine=affine)
    if affine:
        trained(norm)
    region = captured_of(nn.Conv2d(3, 6, 3), norm, shape=(2, 3, 7, 7))
    fold(region)
    mean, std = kept_statistics(region.get_submodule("0"))
    assert torch.equal(mean, norm.bias.detach() if affine else torch.zeros(6))
    assert torch.equal(std, norm.weight.detach().abs() if affine else torch.ones(6))
    assert set(region.state_dict()) == {"0.weight", "0.bias"}
    forget_statistics(region)
    assert kept_statistics(region.get_submodule("0")) is None
