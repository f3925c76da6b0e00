"""Learned rounding: one fused step is what autograd and Adam do with the paper's formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfeven.ptq.reconstruction.adaround import (
    Rounding,
    inverse_soft_step,
    regularizer,
    regularizer_sharpness,
    soft_step,
    soft_weight,
)
from halfeven.quantization.scheme import Scheme

pytestmark = pytest.mark.usefixtures("fused")

S4 = Scheme(bits=4, signed=True, symmetric=True, narrow=True, axis=0)


def rounding(weight, scale, scheme=S4):
    return Rounding.of(weight, scale, scheme)


@given(st.floats(0, 0.999))
def test_the_inverse_of_the_rectified_sigmoid(step):
    assert float(soft_step(inverse_soft_step(torch.tensor(step, dtype=torch.float64)))) == pytest.approx(step, abs=1e-9)


def test_the_rectified_sigmoid_reaches_its_ends():
    assert soft_step(torch.tensor([-4.0, 4.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("axis", [0, 1, None])
def test_soft_weights_start_at_the_float_ones(axis):
    torch.manual_seed(0)
    weight = torch.randn(5, 6, 3) * 0.1
    scheme = Scheme(bits=8, signed=True, symmetric=True, narrow=True, axis=axis)
    scale = torch.tensor(0.01) if axis is None else torch.rand(weight.shape[axis]) * 0.01 + 0.005
    found = rounding(weight, scale, scheme)
    assert (
        torch.allclose(found.soft, weight.clamp(-127 * scale.max(), 127 * scale.max()), atol=1e-7) or axis is not None
    )
    inside = weight.abs() < 127 * float(scale.min())
    assert torch.allclose(found.soft[inside], weight[inside], atol=1e-7)


def test_what_lies_beyond_the_grid_is_clipped():
    found = rounding(torch.tensor([[5.0, -5.0, 0.1]]), torch.tensor([0.1]))
    assert found.soft[0, :2].tolist() == pytest.approx([0.7, -0.7])
    assert found.integers.tolist() == [[7.0, -7.0, 1.0]]


def test_sharpness_falls_from_20_to_2():
    values = [regularizer_sharpness(p) for p in (0.0, 0.25, 0.5, 1.0)]
    assert values == pytest.approx([20, values[1], 11, 2])
    assert values == sorted(values, reverse=True)


def test_the_regularizer_is_1_where_undecided_and_0_where_decided():
    values = regularizer(torch.tensor([0.0, 5.0, -5.0]), 4.0)
    assert values.tolist() == pytest.approx([1.0, 0.0, 0.0])


@given(st.integers(0, 1000), st.floats(2.0, 20.0), st.floats(0.0, 0.1))
def test_a_step_is_autograd_and_adam(seed, beta, strength):
    torch.manual_seed(seed)
    weight, scale, target = torch.randn(4, 7), torch.rand(4) * 0.2 + 0.1, torch.randn(4, 7)
    found = rounding(weight, scale)
    v = found.v.clone().requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(4):
        ((found.soft - target) ** 2).sum().backward()
        found.step(0.05, strength, beta)
        soft = soft_weight(v, found.floor, found.scale, -7, 7)
        loss = ((soft - target) ** 2).sum() + strength * regularizer(v, beta).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.allclose(found.v, v, atol=2e-4)
        assert torch.allclose(found.soft, soft_weight(v, found.floor, found.scale, -7, 7), atol=1e-4)


def test_strong_regularization_decides_everything_and_keeps_what_data_wants():
    torch.manual_seed(0)
    weight, scale = torch.randn(8, 50) * 0.3, torch.full((8,), 0.1)
    found = rounding(weight, scale)
    up = torch.rand(8, 50) < 0.5
    target = found.scale * torch.clamp(found.floor + up, -7, 7)
    for step in range(300):
        ((found.soft - target) ** 2).sum().backward()
        found.step(0.03, 0.001, regularizer_sharpness(step / 300))
    assert found.undecided == 0
    assert torch.equal(found.integers, torch.clamp(found.floor + up, -7, 7))


def test_the_gradient_of_a_learned_scale_is_that_of_the_soft_weight():
    torch.manual_seed(0)
    found = rounding(torch.randn(3, 5), torch.tensor([0.1, 0.2, 0.3]))
    found.scale.requires_grad_()
    target = torch.randn(3, 5)
    ((found.soft - target) ** 2).sum().backward()
    found.set_scale_gradient()
    scale = found.scale.detach().clone().requires_grad_()
    ((soft_weight(found.v, found.floor, scale, -7, 7) - target) ** 2).sum().backward()
    assert torch.allclose(found.scale.grad, scale.grad, rtol=1e-4)
