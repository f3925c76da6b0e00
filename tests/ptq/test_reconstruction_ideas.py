"""Benchmarks of ideas that are not in halfeven: each takes hold of the functions that it replaces, and lets go."""

from pathlib import Path

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.ptq import pipeline
from halfeven.ptq.reconstruction import optimize
from halfeven.ptq.reconstruction.adaround import Rounding
from halfeven.quantization.scheme import Scheme


@pytest.fixture
def ideas(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import reconstruction_ideas

    return reconstruction_ideas


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


@torch.no_grad()
def quantized_outputs():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(64, 5)).eval()
    images = torch.randn(16, 1, 6, 6)
    return he.quantize(network, images.split(8), scheme="w4a4", iterations=6)(images)


@pytest.fixture(scope="module")
def by_default():
    return quantized_outputs()


def replaced_functions():
    return pipeline.reconstruct, pipeline.calibrate, optimize._minimize_error, optimize._relative_error


@pytest.mark.parametrize("idea", ["MRECG", "FIMA-Q", "PD-Quant"])
def test_an_idea_changes_the_reconstruction_within_its_context_alone(ideas, by_default, idea):
    before = replaced_functions()
    with ideas.IDEAS[idea]():
        found = quantized_outputs()
    assert not torch.equal(found, by_default)
    assert replaced_functions() == before


def test_neighbours_are_joined_where_errors_oscillate(ideas):
    groups = ideas.oscillating_groups([5, 5, 5, 9, 5, 5, 5, 5, 1, 5, 5, 5, 5])
    assert [len(group) for group in groups if {3, 8} & set(group)] == [3, 3]
    assert [index for group in groups for index in group] == list(range(13))


def test_signed_steps_lower_the_error_of_a_linear_layer(ideas):
    from signed_rounding import SignedRounding

    torch.manual_seed(0)
    weight, inputs = torch.randn(4, 16), torch.randn(64, 16) @ torch.randn(16, 16)
    scheme = Scheme(bits=4, signed=True, symmetric=True, axis=0)

    def error():
        return (inputs @ (rounding.soft - weight).T).square().mean()

    given = {"total": 50, "moves_scale": True, "loss": lambda: float(error().detach())}
    rounding = SignedRounding.of_linear(weight, weight.abs().amax(1) / scheme.quant_max, scheme, **given)
    nearest = error().detach()
    for _ in range(50):
        error().backward()
        rounding.step(0.0, 0.0, 0.0)
    assert error() < 0.8 * nearest
    assert torch.equal(rounding.soft.detach(), rounding.scale * rounding.integers)


def test_other_weights_than_those_of_linear_layers_keep_adaround(ideas):
    from signed_rounding import SignedRounding

    scheme = Scheme(bits=4, signed=True, symmetric=True)
    given = {"total": 50, "moves_scale": True, "loss": lambda: 0.0}
    assert type(SignedRounding.of_linear(torch.ones(2, 2, 1, 1), torch.tensor(1.0), scheme, **given)) is Rounding
