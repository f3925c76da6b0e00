"""Moments through operators, against samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from halfeven.ptq.data_free.moments import (
    Distribution,
    after_clip,
    after_concatenation,
    after_function,
    after_scaling,
    after_sum,
    clipped_moments,
    collapsed,
    constant_distribution,
    gaussian,
    multiplied,
)

MEAN, STD = torch.tensor([-3.0, 0.0, 0.4, 5.0]), torch.tensor([0.5, 1.0, 2.0, 3.0])
INF = float("inf")


def samples(mean=MEAN, std=STD, count=400_000):
    return mean + std * torch.randn(count, len(mean), dtype=torch.float64)


def assert_moments(found: Distribution, values, tolerance=0.02):
    torch.testing.assert_close(found.mean, values.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.std, values.std(0), rtol=tolerance, atol=tolerance)
    assert (found.low <= values.quantile(0.001, 0) + 2e-3).all()
    assert (found.high >= values.quantile(0.999, 0) - 2e-3).all()


X = gaussian(MEAN, STD, 6.0, 1, True)


@pytest.mark.parametrize("bounds", [(0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-INF, 2.0), (-INF, INF)])
def test_clipping_against_samples(bounds):
    assert_moments(after_clip(X, *bounds), samples().clamp(*bounds))


@given(st.floats(-5, 5), st.floats(0.01, 5), st.floats(-3, 0), st.floats(0.1, 7))
def test_clipping_in_closed_form_is_the_integral(mean, std, low, high):
    mean, std = torch.tensor([mean]), torch.tensor([std])
    closed = clipped_moments(mean, std, low, high)
    integral = after_function(gaussian(mean, std, 6.0, None, True), lambda x: x.clamp(low, high))
    torch.testing.assert_close(closed[0], integral.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(closed[1], integral.std, rtol=1e-2, atol=2e-3)


def test_relu_as_the_white_paper_writes_it():
    """Section 3.3: gamma p(-beta / gamma) + beta (1 - P(-beta / gamma))."""
    normal = torch.distributions.Normal(0.0, 1.0)
    z = -MEAN / STD
    expected = STD * normal.log_prob(z).exp() + MEAN * (1 - normal.cdf(z))
    torch.testing.assert_close(clipped_moments(MEAN, STD, 0.0, INF)[0], expected.double(), rtol=1e-5, atol=1e-5)


def test_channels_without_spread():
    mean, std = clipped_moments(torch.tensor([-1.0, 0.0, 2.0]), torch.zeros(3), 0.0, INF)
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(std, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.sigmoid, F.hardswish, F.leaky_relu, torch.tanh])
def test_other_functions_against_samples(function):
    found = after_function(X, function)
    assert_moments(found, function(samples()))
    assert found.axis == 1
    if function is F.silu:  # the least value is between the ends
        assert found.low[3] == pytest.approx(-0.2785, abs=2e-3)


def test_sums_products_and_factors_against_samples():
    other = after_clip(gaussian(MEAN.flip(0), STD, 6.0, 1, True), 0.0, INF)
    y = samples(MEAN.flip(0)).clamp(min=0)
    assert_moments(after_sum(X, other, 6.0), samples() + y)
    assert_moments(multiplied(X, other), samples() * y)
    assert_moments(after_scaling(X, -2.5), samples() * -2.5)


def test_a_sum_stays_within_what_its_terms_allow():
    positive = after_clip(X, 0.0, 6.0)
    total = after_sum(positive, positive, 6.0)
    assert (total.low >= 0).all()
    assert (total.high <= 12).all()


def test_the_extent_of_a_sum_of_gaussians_is_that_of_a_gaussian():
    expected = gaussian(2 * MEAN, (2 * STD**2).sqrt(), 6.0, 1, True)
    torch.testing.assert_close(after_sum(X, X, 6.0).low, expected.low, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after_sum(X, X, 6.0).high, expected.high, rtol=1e-6, atol=1e-6)


def test_moments_of_constants():
    found = constant_distribution(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert [float(v) for v in (found.mean, found.low, found.high)] == [4, 1, 7]
    assert float(constant_distribution(-2).std) == 0
    assert_moments(after_sum(X, constant_distribution(3.0), 6.0), samples() + 3)


def test_joined_and_collapsed_channels():
    both = after_concatenation([X, after_clip(X, 0.0, INF)], 1)
    assert len(both.mean) == 8
    values = torch.cat([samples(), samples().clamp(min=0)], 1).reshape(-1, 1)
    assert_moments(collapsed(both), values)
    assert collapsed(both).axis is None
    assert collapsed(both).low == both.low.min()


def test_channels_on_different_axes_become_one():
    other = gaussian(torch.zeros(7), torch.ones(7), 6.0, 2, False)
    total = after_sum(X, other, 6.0)
    assert total.axis is None
    assert not total.measured
    assert len(total.mean) == 1
    assert total.mean == pytest.approx(float(MEAN.mean()))
