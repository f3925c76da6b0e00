"""Operators on complex numbers, written out with real and imaginary parts."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfeven.graph.capture import capture
from halfeven.graph.complex_numbers import lower_complex
from halfeven.graph.view import operations


class Rotary(nn.Module):
    """Rotates pairs of features by angles, as Llama's reference code does."""

    def __init__(self, *, stored):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        angles = torch.outer(torch.arange(16.0), 10000 ** -torch.linspace(0, 1, 4))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles) if stored else angles)
        self.stored = stored

    def forward(self, x):
        table = self.table[: x.shape[1]]
        turn = table if self.stored else torch.polar(torch.ones_like(table), table)
        pairs = torch.view_as_complex(self.fc(x).float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[None]).flatten(2).type_as(x)


class Computes(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(8, 8), function
        self.factor = nn.Parameter(torch.randn(4, dtype=torch.cfloat))

    def forward(self, x):
        real, imaginary = self.fc(x).chunk(2, -1)
        return self.function(torch.complex(real, imaginary), self.factor)


MODELS = {
    "rotary, stored": lambda: Rotary(stored=True),
    "rotary, computed": lambda: Rotary(stored=False),
    "a parameter": lambda: Computes(lambda z, w: torch.view_as_real(z * w + w * 2)),
    "lengths and angles": lambda: Computes(lambda z, w: torch.cat([z.abs(), (z * w).angle()], -1)),
    "conjugate": lambda: Computes(lambda z, w: (z.conj() * z).real + (z - w.conj()).imag),
    "numbers": lambda: Computes(lambda z, w: (1j * z / 2 - (1 + 2j) * z).real),
    "moves": lambda: Computes(
        lambda z, w: torch.view_as_real(torch.cat([z.transpose(1, 2)[:, 1:], z.movedim(2, 1)], 1).sum(1).unsqueeze(1))
    ),
}


def step(model, x):
    model.zero_grad()
    y = model.train()(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_they_give_the_same_outputs_and_gradients(name):
    model, x = MODELS[name](), torch.randn(3, 5, 8)
    captured, _ = capture(model, x)
    assert lower_complex(captured) > 0
    values = [
        value for op in operations(captured.graph) if not op.is_constant for value in pytree.tree_leaves(op.value)
    ]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    other = torch.randn(4, 5, 8)
    torch.testing.assert_close(step(captured, other), step(model, other))
    assert set(captured.state_dict()) == set(model.state_dict())


def test_a_fourier_transform_stays():
    model, x = Computes(lambda z, w: torch.fft.irfft(torch.fft.rfft(z.real) * 2, n=4)), torch.randn(3, 5, 8)
    captured, _ = capture(model, x)
    before = len(captured.graph.nodes)
    assert lower_complex(captured) == 0
    assert len(captured.graph.nodes) == before
    torch.testing.assert_close(captured(x), model(x))
