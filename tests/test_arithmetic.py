"""The arithmetic against its definition, ONNX's reference evaluator, and gradients known beforehand."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from halfeven import arithmetic
from halfeven.arithmetic import (
    SMALLEST_SCALE,
    dequantize,
    effective_scale,
    fake_quantize,
    quantize,
    scale_and_zero_point,
    snap,
)
from halfeven.scheme import Scheme

SIGNED4 = Scheme(bits=4, signed=True)
settings.register_profile("arithmetic", max_examples=60, deadline=None)
settings.load_profile("arithmetic")


@st.composite
def schemes(draw, axis=None):
    signed = draw(st.booleans())
    return Scheme(
        bits=draw(st.integers(2, 16)),
        signed=signed,
        symmetric=draw(st.booleans()),
        narrow=signed and draw(st.booleans()),
        axis=axis,
    )


def spread(seed: int, count: int, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * size


seeds = st.integers(0, 2**31)
sizes = st.floats(-6, 6).map(lambda power: 10.0**power)
ends = st.floats(-1e6, 1e6, width=32)


def int32(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.int32)


# Ranges to scales


@given(schemes(), ends, ends)
def test_scale_and_zero_point_are_on_the_grid(scheme, a, b):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    assert torch.isfinite(scale)
    assert scale > 0
    assert zero_point.dtype is torch.int32
    assert scheme.quant_min <= int(zero_point) <= scheme.quant_max
    assert not scheme.symmetric or int(zero_point) == 0
    assert torch.equal(snap(scale), scale)
    zero = fake_quantize(torch.zeros(3), scale, zero_point, scheme)
    assert torch.equal(zero, torch.zeros(3))


@given(schemes(), ends, ends)
def test_the_grid_contains_the_range_within_half_a_step(scheme, a, b):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    if high - low < 1e-3 or (scheme.symmetric and not scheme.signed and high < 1e-3):
        return
    scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), scheme)
    bottom, top = ((end - int(zero_point)) * scale.item() for end in (scheme.quant_min, scheme.quant_max))
    # Snapping moves the scale by up to 2^-17, which the whole grid feels.
    slack = scale.item() * (0.5 + scheme.levels * 2.0**-16)
    if not (scheme.symmetric and not scheme.signed):
        assert bottom <= low + slack
    assert top >= high - slack
    # And it is no larger than it need be.
    extent = 2 * max(-low, high) if scheme.symmetric and scheme.signed else (high if scheme.symmetric else high - low)
    assert top - bottom <= extent * (1 + 2.0**-15) + 2 * scale.item()


@given(schemes(), seeds, sizes)
def test_values_in_range_move_by_half_a_step_at_most(scheme, seed, size):
    x = spread(seed, 64, size)
    x = x.abs() if scheme.symmetric and not scheme.signed else x
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), scheme)
    moved = (fake_quantize(x, scale, zero_point, scheme) - x).abs().max()
    # The ends may be outside by the rounding of the zero point (half a step) and by snapping.
    assert moved <= scale * (1.0 + scheme.levels * 2.0**-16)
    bottom, top = ((end - zero_point) * scale for end in (scheme.quant_min, scheme.quant_max))
    inner = x[(x >= bottom) & (x <= top)]
    assert (fake_quantize(inner, scale, zero_point, scheme) - inner).abs().max() <= scale * (0.5 + 2.0**-7)


def test_a_range_without_zero_is_widened_to_it():
    scale, zero_point = scale_and_zero_point(torch.tensor(0.5), torch.tensor(2.0), Scheme())
    assert scale.item() == pytest.approx(2 / 255, rel=2e-5)
    assert zero_point == 0
    scale, zero_point = scale_and_zero_point(torch.tensor(-2.0), torch.tensor(-0.5), Scheme())
    assert scale.item() == pytest.approx(2 / 255, rel=2e-5)
    assert zero_point == 255


def test_ranges_of_the_seed_system():
    scale, zero_point = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(2.0), Scheme())
    assert scale.item() == pytest.approx(0.011764706, rel=2e-5)
    assert zero_point == 85
    weights = torch.tensor([[1, -2, 0.5], [0.1, 0.2, -0.05]])
    scheme = Scheme(signed=True, symmetric=True, narrow=True, axis=0)
    scale, zero_point = scale_and_zero_point(*weights.aminmax(dim=1), scheme)
    torch.testing.assert_close(scale, torch.tensor([0.015748031, 0.0015748031]), rtol=2e-5, atol=0)
    found = fake_quantize(weights, scale, zero_point, scheme)
    torch.testing.assert_close(found[0], torch.tensor([1.007874, -2, 0.503937]), rtol=2e-5, atol=1e-7)
    # 0.1 is 63.5 steps, a tie that snapping the scale decides.
    torch.testing.assert_close(found[1, 1:], torch.tensor([0.2, -0.050394]), rtol=2e-5, atol=1e-7)


def test_dead_channels_take_their_neighbours_scale():
    scheme = Scheme(signed=True, symmetric=True, narrow=True, axis=0)
    low, high = torch.tensor([-1.0, 0.0, -3.0, 1e-30]), torch.tensor([1.0, 0.0, 2.0, 1e-30])
    scale, _ = scale_and_zero_point(low, high, scheme)
    assert scale[1] == scale[3] == scale[2]
    scale, _ = scale_and_zero_point(torch.zeros(2), torch.zeros(2), scheme)
    assert torch.equal(scale, snap(torch.tensor([1 / 127, 1 / 127])))


def test_a_negative_tensor_on_a_symmetric_unsigned_grid_has_a_scale():
    scale, zero_point = scale_and_zero_point(torch.tensor(-3.0), torch.tensor(-1.0), Scheme(symmetric=True))
    assert scale > 0
    assert zero_point == 0


# Snapping


@given(st.floats(2.0**-40, 2.0**100, width=32))
def test_snap_keeps_16_significand_bits_and_the_nearest_ones(value):
    snapped = snap(torch.tensor(value)).item()
    mantissa, exponent = np.frexp(snapped)
    assert float(mantissa) * 2**16 == int(float(mantissa) * 2**16)
    step = 2.0 ** (int(np.frexp(value)[1]) - 16)
    assert abs(snapped - value) <= step / 2
    assert snap(torch.tensor(snapped)).item() == snapped
    assert exponent >= -40


def test_snap_rounds_ties_to_even():
    unit = 2.0**-15  # of 16 bits at 1
    values = torch.tensor([1 + 0.5 * unit, 1 + 1.5 * unit, 1 + 2.5 * unit], dtype=torch.float32)
    assert snap(values).tolist() == [1.0, 1 + 2 * unit, 1 + 2 * unit]
    assert snap(torch.tensor(2 - 2.0**-23)).item() == 2.0  # the carry reaches the exponent


@given(ends, ends)
def test_a_snapped_scale_survives_the_ends_of_a_fakequantize(a, b):
    for scheme in (Scheme(), Scheme(signed=True, symmetric=True, narrow=True), Scheme(bits=4)):
        scale, zero_point = scale_and_zero_point(torch.tensor(min(a, b)), torch.tensor(max(a, b)), scheme)
        low, high = (scheme.quant_min - zero_point) * scale, (scheme.quant_max - zero_point) * scale
        assert torch.equal((high - low) / torch.tensor(float(scheme.levels - 1)), scale)


# Quantizing


@given(schemes(), seeds, sizes)
def test_fake_quantize_twice_is_once(scheme, seed, size):
    x = spread(seed, 64, size)
    scale, zero_point = scale_and_zero_point(x.min() / 2, x.max() / 2, scheme)  # some are clipped
    once = fake_quantize(x, scale, zero_point, scheme)
    assert torch.equal(fake_quantize(once, scale, zero_point, scheme), once)
    assert torch.equal(dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme), once)


@given(schemes(), seeds, sizes)
def test_integers_are_the_definition(scheme, seed, size):
    x = spread(seed, 64, size)
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), scheme)
    expected = np.clip(np.rint(x.numpy() / scale.numpy()) + zero_point.numpy(), scheme.quant_min, scheme.quant_max)
    found = quantize(x, scale, zero_point, scheme)
    assert np.array_equal(found.numpy(), expected)
    assert found.dtype is torch.float32


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5])
    integers = quantize(x, torch.tensor(1.0), int32(0), SIGNED4)
    assert integers.tolist() == [0, 2, 2, 4, 0, -2, -2]
    # With an odd zero point: ties go to the even multiple of the scale, before the zero point is added.
    assert quantize(x, torch.tensor(1.0), int32(3), Scheme()).tolist() == [3, 5, 5, 7, 3, 1, 1]


@given(st.integers(2, 8), st.booleans(), seeds, st.integers(0, 3))
def test_per_channel_is_per_tensor_channel_by_channel(bits, signed, seed, axis):
    x = spread(seed, 2 * 3 * 4 * 5, 1.0).reshape(2, 3, 4, 5) * torch.tensor([0.1, 1, 10, 100, 1000])
    one, many = Scheme(bits=bits, signed=signed), Scheme(bits=bits, signed=signed, axis=axis)
    rows = x.movedim(axis, 0).flatten(1)
    scale, zero_point = scale_and_zero_point(rows.amin(1), rows.amax(1), many)
    together = fake_quantize(x, scale, zero_point, many)
    for channel in range(x.shape[axis]):
        alone = fake_quantize(x.select(axis, channel), scale[channel], zero_point[channel], one)
        assert torch.equal(together.select(axis, channel), alone)
    assert torch.equal(dequantize(quantize(x, scale, zero_point, many), scale, zero_point, many), together)


def reference(x, scale, zero_point, kind, axis):
    """Integers and values by ONNX's own evaluator of QuantizeLinear and DequantizeLinear."""
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    outputs = [
        onnx.helper.make_tensor_value_info("q", kind, None),
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
    ]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    constants = [
        onnx.numpy_helper.from_array(scale.numpy(), "s"),
        onnx.numpy_helper.from_array(zero_point.numpy().astype(dtype), "z"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    return ReferenceEvaluator(model).run(None, {"x": x.numpy()})


@settings(max_examples=25)
@given(st.booleans(), st.booleans(), seeds, sizes, st.sampled_from([None, 0, 1, 2]))
def test_equals_the_onnx_reference_evaluator(signed, symmetric, seed, size, axis):
    scheme = Scheme(signed=signed, symmetric=symmetric, axis=axis)
    x = spread(seed, 3 * 4 * 5, size).reshape(3, 4, 5)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    low, high = rows.amin(1) / 2, rows.amax(1)
    scale, zero_point = scale_and_zero_point(*((low, high) if axis is not None else (low[0], high[0])), scheme)
    kind = onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8
    integers, values = reference(x, scale, zero_point, kind, 1 if axis is None else axis)
    assert np.array_equal(quantize(x, scale, zero_point, scheme).numpy(), integers.astype(np.float32))
    assert np.array_equal(fake_quantize(x, scale, zero_point, scheme).numpy(), values)


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


# Layouts and dtypes


def upstream(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def forward_and_backward(x, scheme, channels):
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(channels or (), generator=generator) * 0.1 + 0.05
    scale.requires_grad_()
    zero_point = torch.full(scale.shape, 7, dtype=torch.int32)
    y = fake_quantize(x, scale, zero_point, scheme)
    y.backward(upstream(y.shape))
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
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


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    y = fake_quantize(x, torch.tensor(0.1), int32(0), Scheme())
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_computes_in_float32(dtype):
    x = torch.randn(100).to(dtype).requires_grad_()
    y = fake_quantize(x, torch.tensor(0.03), int32(100), Scheme())
    expected = fake_quantize(x.detach().float(), torch.tensor(0.03), int32(100), Scheme())
    assert y.dtype is dtype
    assert torch.equal(y.detach(), expected.to(dtype))
    y.sum().backward()
    assert x.grad.dtype is dtype


def test_more_kernels_than_the_compilers_limit_of_eight_are_no_error():
    variants = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for elements in (1, 40):
            for channels in (None, 1, 3):
                x = torch.randn(channels or 1, elements).to(dtype)
                scale = torch.full((channels,) if channels else (), 0.1)
                scheme = Scheme(bits=4, signed=True, axis=None if channels is None else 0)
                found = fake_quantize(x, scale, torch.zeros_like(scale, dtype=torch.int32), scheme)
                expected = (torch.round(x.float() / 0.1).clamp(-8, 7) * torch.tensor(0.1)).to(dtype)
                assert torch.equal(found, expected)
                variants += 1
    assert variants > 8


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_empty_and_single(shape):
    x = torch.full(shape, 0.26)
    assert fake_quantize(x, torch.tensor(0.1), int32(0), SIGNED4).shape == shape


EAGER = """
import sys, torch
from halfeven import arithmetic
from halfeven.arithmetic import fake_quantize
from halfeven.scheme import Scheme
assert arithmetic.compiler_works() is False
saved = torch.load(sys.argv[1], weights_only=True)
results = []
for axis, x, scale, zero_point in saved:
    x.requires_grad_(); scale.requires_grad_()
    y = fake_quantize(x, scale, zero_point, Scheme(axis=axis), 0.5)
    (y * torch.arange(1.0, y.numel() + 1).reshape(y.shape)).sum().backward()
    results.append((y.detach(), x.grad, scale.grad))
torch.save(results, sys.argv[2])
"""


def test_eager_equals_compiled(tmp_path):
    if not arithmetic.compiler_works():
        pytest.skip("torch.compile finds no compiler here")
    cases = []
    for axis, channels in ((None, None), (0, 4), (1, 5)):
        scale = torch.rand(channels or ()) * 0.05 + 0.01
        zero_point = torch.randint(0, 255, scale.shape, dtype=torch.int32)
        ties = torch.randint(-300, 300, (4, 5, 6)).float() * 0.005
        cases += [(axis, x, scale.clone(), zero_point) for x in (torch.randn(4, 5, 6) * 3, ties)]
    torch.save(cases, tmp_path / "in.pt")
    environment = {**os.environ, "HALFEVEN_COMPILE": "0"}
    command = [sys.executable, "-c", EAGER, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, env=environment, check=True, timeout=120)
    eager = torch.load(tmp_path / "out.pt", weights_only=True)
    for (axis, x, scale, zero_point), (y, dx, ds) in zip(cases, eager, strict=True):
        x.requires_grad_()
        scale.requires_grad_()
        found = fake_quantize(x, scale, zero_point, Scheme(axis=axis), 0.5)
        (found * torch.arange(1.0, found.numel() + 1).reshape(found.shape)).sum().backward()
        assert torch.equal(found.detach(), y)
        assert torch.equal(x.grad, dx)
        torch.testing.assert_close(scale.grad, ds, rtol=1e-5, atol=1e-2)


def test_a_missing_compiler_is_said_once_and_changes_nothing(monkeypatch, caplog):
    def broken(function):
        def fail(*arguments):
            raise RuntimeError("no compiler found\ndetails")

        return fail

    x, scale = torch.randn(50), torch.tensor(0.1)
    expected = fake_quantize(x, scale, int32(0), SIGNED4)
    monkeypatch.setattr(arithmetic, "_compiler_works", None)
    monkeypatch.setattr(arithmetic, "_compiled", broken)
    with caplog.at_level("WARNING", logger="halfeven.arithmetic"):
        found = [fake_quantize(x, scale, int32(0), SIGNED4) for _ in range(3)]
    assert all(torch.equal(f, expected) for f in found)
    messages = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(messages) == 1
    assert "no compiler found" in messages[0]
    assert "details" not in messages[0]
