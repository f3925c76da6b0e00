"""Range estimators against brute force, and what they do with bad data."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from halfeven.errors import CalibrationError, ConfigError
from halfeven.quantization.arithmetic import scale_and_zero_point
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.observers import (
    BINS,
    OBSERVERS,
    HistogramObserver,
    make_observer,
    percentile_range,
)
from halfeven.quantization.scheme import Scheme
from processes import forked
from sweeps import crossed

pytestmark = pytest.mark.usefixtures("fused")

HISTOGRAMS = ("percentile", "mse", "lp", "entropy")
BY_CHANNEL = sorted(set(OBSERVERS) - {"cross_entropy"})
PER_TENSOR = Scheme()
WEIGHT = Scheme(signed=True, symmetric=True, narrow=True)


def observe(name, batches, scheme=PER_TENSOR):
    observer = make_observer(name, scheme)
    for batch in batches:
        observer.update(batch)
    return observer.range()


def batches(count=4, rows=1, elements=500):
    """Batches of different spread and offset."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, elements, generator=generator) * (1 + i) + i for i in range(count)]


def error(x, low, high, scheme, power=2.0):
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    return ((fake_quantize(x, scale, zero_point, scheme) - x).abs() ** power).sum().item()


def test_min_max_is_the_extremes():
    low, high = observe("minmax", batches(rows=3))
    everything = torch.cat(batches(rows=3), 1)
    assert torch.equal(low, everything.amin(1))
    assert torch.equal(high, everything.amax(1))


@pytest.mark.parametrize(
    "scheme", [WEIGHT, PER_TENSOR, Scheme(bits=4), Scheme(bits=4, signed=False, symmetric=True)], ids=str
)
def test_lsq_starts_from_the_mean_absolute_value(scheme):
    data = [batch.abs() if scheme.symmetric and not scheme.signed else batch for batch in batches()]
    scale, zero_point = scale_and_zero_point(*observe("lsq", data, scheme), scheme)
    expected = 2 * torch.cat(data, 1).abs().mean() / scheme.quant_max**0.5
    assert float(scale) == pytest.approx(float(expected), rel=1e-4)
    _, from_extremes = scale_and_zero_point(*observe("minmax", data, scheme), scheme)
    assert torch.equal(zero_point, from_extremes)


def test_moving_average_starts_with_the_first_batch():
    data = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 1.0]]), torch.tensor([[0.0, 10.0]])]
    ranges = [observe("moving_average", data[:n]) for n in (1, 2, 3)]
    expected = [(-1, 2), (-1.2, 1.9), (-1.08, 2.71)]  # constant 0.1
    for (low, high), (lower, upper) in zip(ranges, expected, strict=True):
        assert low.item() == pytest.approx(lower)
        assert high.item() == pytest.approx(upper)


def test_moving_average_per_channel():
    data = batches(rows=3)
    low, high = observe("moving_average", data)
    for channel in range(3):
        alone = observe("moving_average", [b[channel : channel + 1] for b in data])
        assert low[channel] == alone[0][0]
        assert high[channel] == alone[1][0]


@pytest.mark.parametrize("name", ["minmax", *HISTOGRAMS])
def test_batches_in_any_order_give_the_same_range(name):
    """Exactly the same where the bins are: the first batch, which sets their width, stays first."""
    first, *rest = batches(6)
    ranges = {
        tuple(r.item() for r in observe(name, [first, *order])) for order in (rest, rest[::-1], rest[2:] + rest[:2])
    }
    assert len(ranges) == 1


@pytest.mark.parametrize("name", ["minmax", *HISTOGRAMS])
def test_batching_does_not_matter(name):
    data = batches(1, rows=2, elements=4096)[0]
    whole = observe(name, [data])
    split = observe(name, list(data.split(512, dim=1)))
    assert torch.equal(whole[0], split[0])
    assert torch.equal(whole[1], split[1])


SERIES = {
    "growing": [[0.0, 1.0], [-100.0, 0.5], [1000.0, -2000.0, 3.0]],
    "far apart": [[1e-30, 2e-30], [5.0, -3.0], [1e20]],
    "first nothing": [[0.0, 0.0], [0.0], [0.25, 0.75]],
    "constant, then more": [[3.0, 3.0], [3.0, 3.5]],
    "far from zero": [[1000.0, 1000.5], [1001.0, 1000.25]],
    "negative": [[-1.0, -0.25], [-7.0]],
}


@pytest.mark.parametrize("series", sorted(SERIES))
def test_the_histogram_is_that_of_all_values_at_once(series):
    observer = make_observer("mse", PER_TENSOR)
    data = [torch.tensor([values]) for values in SERIES[series]]
    for batch in data:
        observer.update(batch)
    everything = torch.cat(data, 1)
    edges = observer.low.double() + torch.arange(BINS + 1, dtype=torch.float64) * observer.width.double()
    expected = torch.histogram(everything[0].double(), edges[0] if edges.ndim > 1 else edges)[0]
    assert torch.equal(observer.counts[0], expected)
    assert observer.counts.sum() == everything.numel()
    used = torch.nonzero(observer.counts[0]).flatten()
    if used[0] != used[-1]:  # as fine as the bins allow, or as float32 is
        extent = everything.max() - everything.min()
        assert observer.width <= max(4 * extent / BINS, everything.abs().max() * 2**-23)


@pytest.mark.parametrize("name", BY_CHANNEL)
@pytest.mark.parametrize("scheme", [PER_TENSOR, WEIGHT, Scheme(bits=4, signed=True)])
def test_per_channel_is_channel_by_channel(name, scheme):
    data = batches(3, rows=3)
    low, high = observe(name, data, scheme)
    for channel in range(3):
        alone = observe(name, [b[channel : channel + 1] for b in data], scheme)
        assert low[channel].item() == pytest.approx(alone[0].item(), rel=1e-5, abs=1e-6)
        assert high[channel].item() == pytest.approx(alone[1].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_numpys(percentile):
    data = torch.randn(1, 20000)
    observer = HistogramObserver(PER_TENSOR, lambda h: percentile_range(h, percentile))
    observer.update(data[:, :5000])
    observer.update(data[:, 5000:])
    low, high = observer.range()
    tail = (100 - percentile) / 2
    width = float(observer.width)
    assert low.item() == pytest.approx(np.percentile(data, tail), abs=2 * width)
    assert high.item() == pytest.approx(np.percentile(data, 100 - tail), abs=2 * width)


def test_percentile_of_one_sided_data_keeps_its_end_at_zero():
    data = torch.rand(1, 20000)
    data[0, :100] = 0
    observer = HistogramObserver(PER_TENSOR, lambda h: percentile_range(h, 99.0))
    observer.update(data)
    low, high = observer.range()
    assert low.clamp(max=0).item() == 0  # a range is widened to contain 0
    assert high.item() == pytest.approx(np.percentile(data, 99), abs=2 / BINS)
    observer = HistogramObserver(PER_TENSOR, lambda h: percentile_range(h, 99.0))
    observer.update(-data)
    low, high = observer.range()
    assert high.clamp(min=0).item() == 0
    assert low.item() == pytest.approx(np.percentile(-data, 1), abs=2 / BINS)


@pytest.mark.parametrize(
    ("bits", "kind", "symmetric"), crossed([2, 3, 4, 8], ["gauss", "outlier", "laplace", "relu"], [True, False])
)
@pytest.mark.parametrize(("name", "power"), [("mse", 2.0), ("lp", 2.4)])
def test_the_search_finds_the_brute_force_optimum(bits, kind, symmetric, name, power):
    x = torch.randn(1, 4000)
    x = {"gauss": x, "outlier": x, "laplace": x * x.abs(), "relu": x.relu()}[kind].clone()
    if kind == "outlier":
        x[0, 0] = 30.0
    scheme = Scheme(bits=bits, signed=kind != "relu" and symmetric, symmetric=symmetric)
    low, high = observe(name, [x], scheme)
    found = error(x, low[0], high[0], scheme, power)
    grid = torch.linspace(0.01, 1.0, 40).tolist()
    if symmetric or kind == "relu":
        candidates = [(x.min() * f, x.max() * f) for f in grid]
    else:
        candidates = [(x.min() * f, x.max() * g) for f in grid for g in grid]
    least = min(error(x, a, b, scheme, power) for a, b in candidates)
    assert found <= 1.03 * least
    assert found <= error(x, x.min(), x.max(), scheme, power)


def test_mse_clips_an_outlier_where_bits_are_few():
    x = torch.cat([torch.randn(1, 10000), torch.tensor([[40.0]])], 1)
    scheme = Scheme(bits=4, signed=True, symmetric=True)
    _, high = observe("mse", [x], scheme)
    assert high.item() < 8
    assert error(x, -high[0], high[0], scheme) < 0.2 * error(x, torch.tensor(-40.0), torch.tensor(40.0), scheme)


def test_a_higher_power_clips_less():
    x = torch.randn(1, 20000)
    scheme = Scheme(bits=3, signed=True, symmetric=True)
    assert observe("lp", [x], scheme)[1] > 1.02 * observe("mse", [x], scheme)[1]


@pytest.mark.parametrize("few", [5, 9, 300])
def test_a_search_over_few_weights_is_that_over_all_bins(few):
    """Rows of different numbers of occupied bins: those that are left out are empty."""
    data = torch.randn(3, few)
    data[1, 2:] = data[1, 0]
    for name in ("mse", "lp"):
        low, high = observe(name, [data], WEIGHT)
        for row in range(3):
            alone = observe(name, [data[row : row + 1]], WEIGHT)
            assert (low[row], high[row]) == (alone[0][0], alone[1][0])


def test_entropy_clips_a_long_tail_and_keeps_the_mass():
    x = torch.cat([torch.randn(1, 20000).abs(), torch.full((1, 2), 60.0)], 1)
    _, high = observe("entropy", [x], Scheme(symmetric=True))
    assert 3 < high.item() < 30
    uniform = torch.linspace(0, 1, 20000)[None]
    _, high = observe("entropy", [uniform], Scheme(symmetric=True))
    assert high.item() > 0.95


def class_batches(count=6, classes=10):
    """Logits with one that stands out, [samples, classes]."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(20, classes, generator=generator) for _ in range(count)]
    for batch in batches:
        batch[torch.arange(20), torch.randint(classes, (20,), generator=generator)] += 6
    return batches


def cross_entropy(values, low, high, scheme):
    """By PyTorch's own loss, with the first distribution as the target."""
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    quantized = fake_quantize(values, scale, zero_point, scheme)
    return nn.functional.cross_entropy(quantized, values.softmax(-1), reduction="sum").item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(signed=True, symmetric=True)])
def test_cross_entropy_finds_the_brute_force_optimum(bits, scheme):
    scheme = dataclasses.replace(scheme, bits=bits)
    data = class_batches()
    values = torch.cat(data)
    low, high = observe("cross_entropy", [batch[None] for batch in data], scheme)
    found = cross_entropy(values, low[0], high[0], scheme)
    grid = torch.linspace(0.02, 1.0, 30).tolist()
    ends = [(f, f) for f in grid] if scheme.symmetric else [(f, g) for f in grid for g in grid]
    least = min(cross_entropy(values, values.min() * f, values.max() * g, scheme) for f, g in ends)
    entropy = nn.functional.cross_entropy(values, values.softmax(-1), reduction="sum").item()
    assert found - entropy <= 1.05 * (least - entropy) + 1e-3


def test_cross_entropy_keeps_the_large_logits_that_squared_error_clips():
    """Many logits near 0 outweigh the one that decides, in squared error and not in the probabilities."""
    values = torch.randn(100, 1000)
    values[:, 0] = 8
    scheme = Scheme(bits=2, signed=True, symmetric=True)
    ranges = [observe(name, [values[None]], scheme) for name in ("mse", "cross_entropy")]
    losses = [cross_entropy(values, low[0], high[0], scheme) for low, high in ranges]
    assert ranges[1][1] > 1.5 * ranges[0][1]
    assert losses[1] < 0.7 * losses[0]


def test_cross_entropy_keeps_a_bounded_choice_that_batching_does_not_change(monkeypatch):
    monkeypatch.setattr("halfeven.quantization.observers.cross_entropy.MAX_LOGITS", 200)
    values = torch.cat(class_batches())
    kept = []
    for size in (7, 20, len(values)):
        observer = make_observer("cross_entropy", Scheme(bits=4))
        for batch in values.split(size):
            observer.update(batch[None])
        assert observer.logits.shape == (20, 10)
        kept.append((observer.logits, *observer.range()))
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(kept[0], other, strict=True))
    places = [int((values == row).all(1).nonzero()[0, 0]) for row in kept[0][0]]
    assert len(set(places)) == 20
    assert max(places) > 80  # not the first that came
    assert min(places) < 40


def test_classes_lie_on_the_last_axis_whatever_comes_before():
    values = class_batches(1)[0]
    flat = observe("cross_entropy", [values[None]])
    assert observe("cross_entropy", [values.reshape(1, 4, 5, 10)]) == flat


def test_logits_have_one_scale():
    with pytest.raises(ConfigError, match="one scale per channel"):
        make_observer("cross_entropy", Scheme(axis=0))


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_tensor_is_represented_exactly(name, value):
    low, high = observe(name, [torch.full((1, 10), value)] * 2, PER_TENSOR)
    scale, zero_point = scale_and_zero_point(low, high, Scheme(axis=0))
    found = fake_quantize(torch.full((1, 4), value), scale, zero_point, Scheme(axis=0))
    assert torch.allclose(found, torch.full((1, 4), value), rtol=0.02)


@pytest.mark.parametrize("name", BY_CHANNEL)
def test_a_dead_channel_leaves_the_others_alone(name):
    data = torch.randn(3, 200)
    data[1] = 0
    low, high = observe(name, [data], WEIGHT)
    assert low[1] == high[1] == 0
    alone = observe(name, [data[[0, 2]]], WEIGHT)
    torch.testing.assert_close(low[[0, 2]], alone[0])
    scale, _ = scale_and_zero_point(low, high, WEIGHT)
    assert scale[1] == scale.max()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_errors(name, bad):
    observer = make_observer(name, PER_TENSOR)
    observer.update(torch.randn(2, 10))
    data = torch.randn(2, 10)
    data[1, 3] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        observer.update(data)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_nothing_seen_is_an_error(name):
    with pytest.raises(CalibrationError, match="no batch"):
        make_observer(name, PER_TENSOR).range()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="minmax, moving_average, percentile, mse, lp, entropy, lsq, cross_entropy"):
        make_observer("histogram", PER_TENSOR)


def _rank(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        mine = [batch[:, rank::2] for batch in batches(3, rows=2)]
        results = {name: observe(name, mine) for name in BY_CHANNEL}
        results["cross_entropy"] = observe("cross_entropy", [batch[None, rank::2] for batch in class_batches()])
        bad = torch.zeros(1, 4)
        if rank == 1:
            bad[0, 0] = float("nan")
        try:
            make_observer("minmax", PER_TENSOR).update(bad)
            results["said"] = (torch.tensor(0),)
        except CalibrationError:
            results["said"] = (torch.tensor(1),)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_on_the_range_of_all_data(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method=forked().get_start_method())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in sorted(OBSERVERS):
        assert torch.equal(first[name][0], second[name][0]), name
        assert torch.equal(first[name][1], second[name][1]), name
        logits = name == "cross_entropy"
        alone = observe(name, [batch[None] for batch in class_batches()] if logits else batches(3, rows=2))
        for found, expected in zip(first[name], alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)
    # A NaN that one process meets stops both: the other would wait for it for ever.
    assert first["said"][0] == second["said"][0] == 1
