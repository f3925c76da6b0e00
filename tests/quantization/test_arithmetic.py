"""The arithmetic against its definition and ONNX's reference evaluator."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from halfeven.quantization.arithmetic import dequantize, quantize, scale_and_zero_point, snap
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.scheme import Scheme
from quantization.grids import SIGNED4, ends, int32, schemes, seeds, sizes, spread

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


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-3e-7, 5e-7), (-9e-7, 1e-7), (-1e-9, 4e-9), (-5e-7, 1e-5)])
def test_a_range_with_a_lower_end_near_zero_is_symmetric(low, high, signed):
    scheme = Scheme(symmetric=False, signed=signed)
    scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), scheme)
    assert zero_point - scheme.quant_min == 128
    assert -128 * scale <= low * (1 - 2e-5)
    assert 127 * scale >= high * (1 - 2e-5)
    assert scale == pytest.approx(max(-low / 128, high / 127), rel=2e-5)


@pytest.mark.parametrize(("low", "high", "bits"), [(0.0, 5e-7, 8), (-1e-9, 1.0, 8), (-2e-6, 5e-7, 8), (-3e-7, 5e-7, 7)])
def test_any_other_range_keeps_its_ends(low, high, bits):
    scheme = Scheme(bits=bits, symmetric=False)
    scale, _ = scale_and_zero_point(torch.tensor(low), torch.tensor(high), scheme)
    assert scale == pytest.approx((high - low) / (scheme.quant_max - scheme.quant_min), rel=2e-5)


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
