"""Fake-quantization: gradients known beforehand, clips, domains and zero points, in any layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfeven.quantization.arithmetic import SMALLEST_SCALE, dequantize, quantize, scale_and_zero_point, snap
from halfeven.quantization.fake_quantize import UNCLIPPED, effective_scale, fake_quantize, stored_scale
from halfeven.quantization.scheme import Scheme
from quantization.grids import SIGNED4, int32, schemes, seeds, sizes, spread
from sweeps import crossed

pytestmark = pytest.mark.usefixtures("fused")

INF = math.inf


# Values


@given(schemes(), seeds, sizes)
def test_fake_quantize_twice_is_once(scheme, seed, size):
    x = spread(seed, 64, size)
    scale, zero_point = scale_and_zero_point(x.min() / 2, x.max() / 2, scheme)  # some are clipped
    once = fake_quantize(x, scale, zero_point, scheme)
    assert torch.equal(fake_quantize(once, scale, zero_point, scheme), once)
    assert torch.equal(dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme), once)


# Gradients


def gradients(x, scale, zero_point, scheme, factor=1.0):
    x = torch.tensor(x, requires_grad=True)
    scale = torch.tensor(scale, requires_grad=True)
    y = fake_quantize(x, scale, zero_point, scheme, factor)
    y.sum().backward()
    return y.detach(), x.grad, scale.grad


LSQ = [
    (
        ([-2, -0.35, -0.04, 0, 0.26, 0.74, 3], 0.1, 0, SIGNED4),
        ([-0.8, -0.4, 0, 0, 0.3, 0.7, 0.7], [0, 1, 1, 1, 1, 1, 0], -1.1),
    ),
    (
        ([0.05, 0.15, 0.25, 0.35, -0.05, -0.15, -0.25], 0.1, 0, SIGNED4),
        ([0, 0.2, 0.2, 0.4, 0, -0.2, -0.2], [1] * 7, 0.5),
    ),
    (([-1, 0.3, 1, 20], 0.05, 127, Scheme()), ([-1, 0.3, 1, 6.4], [1, 1, 1, 0], 128)),
    (([-0.3, 0.1, 0.2, 0.9], 0.1, 3, Scheme(bits=3)), ([-0.3, 0.1, 0.2, 0.4], [1, 1, 1, 0], 4)),
]


@pytest.mark.parametrize(("arguments", "expected"), LSQ)
def test_learned_step_size_gradients(arguments, expected):
    x, scale, zero_point, scheme = arguments
    y, dx, ds = gradients([float(v) for v in x], scale, int32(zero_point), scheme)
    torch.testing.assert_close(y, torch.tensor(expected[0], dtype=torch.float32))
    assert dx.tolist() == expected[1]
    assert ds.item() == pytest.approx(expected[2], abs=1e-4)


def test_the_gradient_factor_scales_only_the_scales_gradient():
    x = [-2.0, -0.35, -0.04, 0.0, 0.26, 0.74, 3.0]
    _, dx, ds = gradients(x, 0.1, int32(0), SIGNED4, (7 * 7) ** -0.5)
    assert ds.item() == pytest.approx(-0.157143, abs=1e-5)
    assert dx.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_learned_step_size_gradients_per_channel():
    scheme = Scheme(bits=4, signed=True, axis=0)
    y, dx, ds = gradients([[-1.0, 0.26, 3.0], [0.5, -0.52, 0.1]], [0.1, 0.05], int32(0, 0), scheme)
    torch.testing.assert_close(y, torch.tensor([[-0.8, 0.3, 0.7], [0.35, -0.4, 0.1]]))
    assert dx.tolist() == [[0, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(ds, torch.tensor([-0.6, -1.0]), rtol=1e-4, atol=1e-4)


@given(schemes(), seeds)
def test_scale_gradient_is_the_finite_difference_with_rounding_held(scheme, seed):
    """The straight-through slope: d/ds of s * clip(x/s + r), where r = round(x/s) - x/s is held at its value."""
    x = spread(seed, 40, 1.0)
    scale, zero_point = scale_and_zero_point(x.min() / 2, x.max() / 2, scheme)
    zero, x64, s = zero_point.double(), x.double(), scale.double()
    held = torch.round(x / scale).double() - (x / scale).double()

    def smooth(step):
        bounded = torch.clamp(x64 / step + held + zero, scheme.quant_min, scheme.quant_max)
        return ((bounded - zero) * step).sum()

    def slope(step, move):
        return (smooth(step + move) - smooth(step - move)) / (2 * move)

    ratio = torch.round(x / scale) + zero_point
    near_the_ends = ((ratio - scheme.quant_min).abs() <= 1) | ((ratio - scheme.quant_max).abs() <= 1)
    if bool(near_the_ends.any()):  # smooth only where no element changes sides
        keep = ~near_the_ends
        x, x64, held = x[keep], x64[keep], held[keep]
    if not len(x):
        return
    variable = scale.clone().requires_grad_()
    fake_quantize(x, variable, zero_point, scheme).sum().backward()
    step = s * 0.05 / scheme.levels  # the slope is constant until an element changes sides
    assert variable.grad.item() == pytest.approx(slope(s, step).item(), rel=1e-3, abs=1e-2)


def test_gradient_stops_outside_the_grid_even_where_it_starts():
    x = torch.tensor([-8.4, -8.6, 7.4, 7.6], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), int32(0), SIGNED4).sum().backward()
    assert x.grad.tolist() == [1, 0, 1, 0]


def test_the_used_scale_is_positive_and_passes_the_gradient_on():
    scale = torch.tensor([0.5, -0.25, 1e-30, 0.1], requires_grad=True)
    used = effective_scale(scale)
    assert used[:2].tolist() == [0.5, 0.25]
    assert used[2] == SMALLEST_SCALE
    assert used[3] == snap(torch.tensor(0.1))
    used.sum().backward()
    assert scale.grad.tolist() == [1, -1, 1, 1]


# Clips


def upstream(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


GRIDS = {
    "unsigned symmetric": (Scheme(bits=4, symmetric=True), int32(0)),
    "asymmetric": (Scheme(bits=4), int32(5)),
    "signed": (SIGNED4, int32(0)),
    "signed, no wider than a clip": (Scheme(bits=2, signed=True, symmetric=True, narrow=True), int32(0)),
}
CLIPS = [(0.0, INF), (0.0, 6.0), (-INF, 1.0), (-1.0, 1.0)]


def results(x, scale, zero_point, scheme, **options):
    """The value, and the gradients of all that is floating, for one upstream gradient."""
    given = [x.clone().requires_grad_(), scale.clone().requires_grad_(), zero_point.clone()]
    if zero_point.is_floating_point():
        given[2].requires_grad_()
    before = options.pop("before", lambda x: x)
    y = fake_quantize(before(given[0]), *given[1:], scheme, **options)
    y.backward(upstream(x.shape))
    return y.detach(), *(tensor.grad for tensor in given if tensor.requires_grad)


@pytest.mark.usefixtures("unfused")  # one kernel for each clip
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("grid", sorted(GRIDS))
@given(seeds, st.floats(0.02, 1))
def test_a_clip_is_a_clamp_before(grid, clip, seed, size):
    scheme, zero_point = GRIDS[grid]
    x, scale = torch.cat([spread(seed, 200, 3.0), torch.tensor([-1.0, 0.0, 1.0, 6.0])]), snap(torch.tensor(size))
    y, dx, ds = results(x, scale, zero_point, scheme, clip=clip)
    y2, dx2, ds2 = results(x, scale, zero_point, scheme, before=lambda x: torch.clamp(x, *clip))
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    torch.testing.assert_close(ds, ds2, rtol=1e-5, atol=1e-4)


def test_at_the_bounds_of_a_clip_the_gradient_is_relus():
    x = torch.tensor([-1.0, 0.0, 1.0, 6.0, 7.0])
    for clip, expected in (((0.0, 6.0), [0, 0, 1, 0, 0]), ((0.0, INF), [0, 0, 1, 1, 1])):
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, torch.tensor(0.5), int32(0), Scheme(), clip=clip).sum().backward()
        assert leaf.grad.tolist() == expected


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_a_clip_keeps_what_is_not_a_number(grid):
    scheme, zero_point = GRIDS[grid]
    y = fake_quantize(torch.tensor([float("nan"), 1.0]), torch.tensor(0.5), zero_point, scheme, clip=(0.0, 6.0))
    assert y.isnan().tolist() == [True, False]


def test_a_clip_in_half_precision_is_a_clamp_before():
    scheme, x = Scheme(bits=4), spread(0, 200, 4.0).bfloat16()
    found = results(x, torch.tensor(0.5), int32(5), scheme, clip=(0.0, 6.0))
    expected = results(x, torch.tensor(0.5), int32(5), scheme, before=lambda x: torch.clamp(x, 0, 6))
    assert found[0].dtype is found[1].dtype is torch.bfloat16
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# Scales stored as logarithms


@given(st.floats(-39, 39))
def test_a_stored_scale_is_given_back(power):
    scale = snap(torch.tensor(2.0**power))
    for domain in ("linear", "log"):
        assert torch.equal(effective_scale(stored_scale(scale, domain), domain), scale)


@given(st.floats(-(2.0**100), 127, width=32))
def test_the_used_scale_is_positive_in_both_domains(stored):
    for domain in ("linear", "log"):
        assert effective_scale(torch.tensor(stored), domain) >= SMALLEST_SCALE


def test_the_used_scale_of_a_logarithm_passes_its_slope_on():
    stored = torch.tensor([0.0, 1.0, -3.0], requires_grad=True)
    used = effective_scale(stored, "log")
    assert used.tolist() == [1, 2, 0.125]
    used.sum().backward()
    torch.testing.assert_close(stored.grad, used.detach() * math.log(2))


@pytest.mark.usefixtures("unfused")  # one kernel for each clip and domain
@pytest.mark.parametrize("clip", [UNCLIPPED, (0.0, 6.0)])
@given(schemes(), seeds, sizes)
def test_a_logarithm_gives_the_values_and_the_gradient_times_its_slope(clip, scheme, seed, size):
    x = spread(seed, 64, size)
    scale, zero_point = scale_and_zero_point(x.min() / 2, x.max() / 2, scheme)
    y, dx, ds = results(x, scale, zero_point, scheme, domain="linear", clip=clip)
    y2, dx2, ds2 = results(x, stored_scale(scale, "log"), zero_point, scheme, domain="log", clip=clip)
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    torch.testing.assert_close(ds2, ds * scale * math.log(2), rtol=1e-4, atol=1e-6 * float(scale))


def test_a_scale_below_zero_is_reflected():
    x, scheme = spread(1, 50, 1.0), SIGNED4
    y, dx, ds = results(x, torch.tensor(0.125), int32(0), scheme, domain="linear")
    y2, dx2, ds2 = results(x, torch.tensor(-0.125), int32(0), scheme, domain="linear")
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    assert torch.equal(ds, -ds2)
    assert ds != 0


def test_the_gradient_of_a_logarithm_is_the_finite_difference_where_elements_are_clipped():
    x, stored = torch.tensor([-40.0, 25.0, 70.0]), torch.tensor(-0.4)
    variable = stored.clone().requires_grad_()
    fake_quantize(x, variable, int32(0), SIGNED4, domain="log").sum().backward()
    up, down = (fake_quantize(x, stored + move, int32(0), SIGNED4, domain="log").sum() for move in (0.01, -0.01))
    assert variable.grad.item() == pytest.approx(((up - down) / 0.02).item(), rel=1e-3)
    assert variable.grad.item() == pytest.approx((-8 + 7 + 7) * 2**-0.4 * math.log(2), rel=1e-4)


# Learned zero points


@pytest.mark.parametrize("stored", [-3.0, -0.4, 2.5, 3.5, 6.6, 14.4, 90.0])
def test_a_learned_zero_point_is_used_as_an_integer_of_the_grid(stored):
    scheme, x = Scheme(bits=4), spread(0, 300, 1.0)
    used = int32(min(max(round(stored), 0), 15))
    y, dx, ds, _ = results(x, torch.tensor(0.125), torch.tensor(stored), scheme)
    y2, dx2, ds2 = results(x, torch.tensor(0.125), used, scheme)
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    assert torch.equal(ds, ds2)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_zero_points_gradient_is_minus_the_scale_outside_of_the_grid(factor):
    scheme = Scheme(bits=3)
    x = torch.tensor([-0.7, -0.5, -0.3, 0.1, 0.4, 0.6, 2.0])  # with zero point 3 the grid is -0.3 to 0.4
    zero_point = torch.tensor(3.2, requires_grad=True)
    fake_quantize(x, torch.tensor(0.1), zero_point, scheme, factor).backward(torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    assert zero_point.grad.item() == pytest.approx(-0.1 * (1 + 2 + 6 + 7) * factor)
    zero_point.grad = None
    fake_quantize(x[2:5], torch.tensor(0.1), zero_point, scheme, factor).sum().backward()
    assert zero_point.grad == 0


def test_a_zero_points_gradient_per_channel():
    scheme, x = Scheme(bits=3, axis=1), torch.tensor([[-9.0, 0.1], [9.0, 0.2], [9.0, -5.0]])
    zero_point = torch.tensor([3.0, 2.0], requires_grad=True)
    fake_quantize(x, torch.tensor([0.5, 0.25]), zero_point, scheme).sum().backward()
    assert zero_point.grad.tolist() == [-1.5, -0.25]


# Gradients of clipping alone


@pytest.mark.parametrize("grid", sorted(GRIDS))
@given(seeds)
def test_without_the_gradient_of_rounding_only_clipped_elements_move_the_scale(grid, seed):
    scheme, zero_point = GRIDS[grid]
    x, scale = spread(seed, 100, 3.0), torch.tensor(0.25)
    y, dx, ds = results(x, scale, zero_point, scheme, rounding_gradient=False)
    y2, dx2, _ = results(x, scale, zero_point, scheme)
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    integers, grad = torch.round(x / scale) + zero_point, upstream(x.shape)
    below, above = grad[integers < scheme.quant_min].sum(), grad[integers > scheme.quant_max].sum()
    expected = below * (scheme.quant_min - zero_point) + above * (scheme.quant_max - zero_point)
    torch.testing.assert_close(ds, expected, rtol=1e-5, atol=1e-4)


def test_without_the_gradient_of_rounding_a_scale_that_clips_nothing_stays():
    x = torch.tensor([0.3, 1.1, 1.3])
    for rounding, moves in ((False, False), (True, True)):
        *_, ds = results(x, torch.tensor(0.25), int32(0), Scheme(bits=4), rounding_gradient=rounding)
        assert bool(ds != 0) is moves


# All of it together


def composed(x, scale, zero_point, scheme, domain, clip, rounding_gradient):
    """The definition, with autograd's own gradients; rounding passes them straight through."""
    scale = effective_scale(scale, domain)
    bounds = scheme.quant_min, scheme.quant_max
    zero = zero_point + (torch.clamp(torch.round(zero_point), *bounds) - zero_point).detach()
    x = torch.clamp(x, *clip)
    steps = torch.round(x / scale).detach()
    integers = steps + zero.detach()
    bounded = torch.clamp(integers, *bounds)
    rounded = (x / scale + (steps - x / scale).detach()) * scale
    passed = rounded if rounding_gradient else x + (rounded - x).detach()
    return torch.where(integers == bounded, passed, (bounded - zero) * scale)


@pytest.mark.usefixtures("unfused")  # a kernel for each combination would take minutes to build
@given(
    seeds,
    st.sampled_from(["linear", "log"]),
    st.sampled_from([UNCLIPPED, *CLIPS]),
    st.booleans(),
    st.sampled_from([Scheme(bits=4), Scheme(bits=3, signed=True), Scheme(bits=8)]),
    st.booleans(),
)
def test_all_options_together_are_the_definition(seed, domain, clip, rounding_gradient, scheme, learns_zero_point):
    x, scale = spread(seed, 120, 3.0), stored_scale(snap(torch.tensor(0.3)), domain)
    zero_point = torch.tensor(2.3) if learns_zero_point else int32(2)
    found = results(x, scale, zero_point, scheme, domain=domain, clip=clip, rounding_gradient=rounding_gradient)
    given = [x.clone().requires_grad_(), scale.clone().requires_grad_(), zero_point.float().requires_grad_()]
    y = composed(*given, scheme, domain, clip, rounding_gradient)
    y.backward(upstream(x.shape))
    expected = [y.detach(), *(tensor.grad for tensor in given)][: len(found)]
    for mine, defined in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, defined, rtol=1e-4, atol=1e-3)


# A known result


@pytest.mark.parametrize(("axis", "zero_point"), crossed([None, 1], ["fixed", "learned"]))
def test_a_known_result_is_returned_and_has_the_gradients_of_the_computed_one(axis, zero_point):
    x = spread(4, 60, 2.0).reshape(5, 3, 4)
    scheme, channels = Scheme(bits=4, axis=axis), () if axis is None else (3,)
    zero_point = int32(3) if zero_point == "fixed" else torch.tensor(2.8)
    scale, zero_point = torch.full(channels, 0.25), zero_point.expand(channels).clone()
    known = torch.full(x.shape, 7.0)
    y, *found = results(x, scale, zero_point, scheme, clip=(-1.0, 2.0), precomputed=known)
    computed, *expected = results(x, scale, zero_point, scheme, clip=(-1.0, 2.0))
    assert torch.equal(y, known)
    assert not torch.equal(computed, known)
    assert len(found) == len(expected)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
    assert all(bool((grad != 0).any()) for grad in found)


# Layouts and dtypes


def forward_and_backward(x, scheme, channels):
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(channels or (), generator=generator) * 0.1 + 0.05
    scale.requires_grad_()
    zero_point = torch.full(scale.shape, 7, dtype=torch.int32)
    y = fake_quantize(x, scale, zero_point, scheme)
    y.backward(upstream(y.shape))
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize(
    ("axis", "layout"), crossed([None, 0, 1, 3], ["channels_last", "transposed", "strided", "expanded"])
)
def test_any_memory_layout_gives_the_same(layout, axis):
    plain = torch.randn(4, 5, 6, 7)
    if layout == "expanded":
        plain = plain[:, :, :1].expand(4, 5, 6, 7).contiguous()
    others = {
        "channels_last": lambda: plain.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: plain.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": lambda: torch.stack([plain, plain], -1)[..., 0],
        "expanded": lambda: plain[:, :, :1].expand(4, 5, 6, 7),
    }
    other = others[layout]()
    assert torch.equal(other, plain)
    assert not other.is_contiguous()
    scheme = Scheme(axis=axis)
    channels = None if axis is None else plain.shape[axis]
    y, dx, ds = forward_and_backward(plain.clone().requires_grad_(), scheme, channels)
    y2, dx2, ds2 = forward_and_backward(other.detach().requires_grad_(), scheme, channels)
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    torch.testing.assert_close(ds, ds2, rtol=1e-5, atol=1e-5)  # another order of the same sum


@pytest.mark.parametrize("axis", [None, 0])
def test_channels_last_stays_channels_last(axis):
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, dx, _ = forward_and_backward(x, Scheme(axis=axis), axis if axis is None else 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_computes_in_float32(dtype):
    x = torch.randn(100).to(dtype).requires_grad_()
    y = fake_quantize(x, torch.tensor(0.03), int32(100), Scheme())
    expected = fake_quantize(x.detach().float(), torch.tensor(0.03), int32(100), Scheme())
    assert y.dtype is dtype
    assert torch.equal(y.detach(), expected.to(dtype))
    y.sum().backward()
    assert x.grad.dtype is dtype


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_empty_and_single(shape):
    x = torch.full(shape, 0.26)
    assert fake_quantize(x, torch.tensor(0.1), int32(0), SIGNED4).shape == shape
