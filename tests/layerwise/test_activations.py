"""Activation caches give what the whole model gives, within a bound of memory."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError
from halfeven.layerwise.activations import activation_caches, block_in_float
from halfeven.layerwise.blocks import find_blocks
from halfeven.layerwise.cache import BoundedCache, store_inputs
from halfeven.layerwise.float_equivalence import float_function
from halfeven.placement.make_plan import regions
from nets import Halves, Residual, prepared

PLENTY = 1e9


def calibrated(model=None):
    torch.manual_seed(0)
    qmodel = prepared((model or Residual()).eval(), scheme="w4a4")
    return he.calibrate(qmodel, [torch.randn(16, 3, 8, 8)]).eval()


def walked(qmodel, images, cache, granularity="layers", size=4):
    """Outputs of the last block in both activation_caches, per batch, after all of it was let go but that."""
    result = []
    batches = store_inputs(qmodel, [images], size, cache)
    for prefix, region in regions(qmodel).items():
        floats, quantized = activation_caches(qmodel, prefix, batches, cache)
        parts = find_blocks(region, granularity)
        for index, block in enumerate(parts):
            with block_in_float(block):
                floats.advance(block)
            quantized.advance(block)
            if index < len(parts) - 1:
                floats.release(parts[: index + 1])
                quantized.release(parts[: index + 1])
        (output,) = parts[-1].outputs
        result.append([(floats.outputs(parts[-1], b)[output], quantized.outputs(parts[-1], b)[output])
                       for b in range(len(floats.batches))])  # fmt: skip
    return result


@pytest.mark.parametrize("granularity", ["layers", "blocks"])
def test_both_caches_end_where_the_model_does(granularity):
    qmodel = calibrated()
    x = torch.randn(10, 3, 8, 8)
    (found,) = walked(qmodel, x, BoundedCache(PLENTY), granularity)
    with torch.no_grad():
        quantized = qmodel(x)
        with float_function(qmodel):
            floats = qmodel(x)
    assert torch.equal(torch.cat([f for f, _ in found]), floats)
    assert torch.equal(torch.cat([q for _, q in found]), quantized)
    assert not torch.allclose(floats, quantized)


def test_the_bound_of_memory_holds_and_changes_nothing(tmp_path):
    qmodel, images = calibrated(), torch.randn(12, 3, 8, 8)
    free = BoundedCache(PLENTY)
    (expected,) = walked(qmodel, images, free)
    bound = BoundedCache(3000, str(tmp_path))
    most = []
    store = bound.store
    bound.store = lambda value: (store(value), most.append(bound.used))[0]
    (found,) = walked(qmodel, images, bound)
    assert max(most) <= 3000
    assert bound.on_disk > 0
    assert free.on_disk == 0
    for pair, other in zip(found, expected, strict=True):
        assert torch.equal(pair[0], other[0])
        assert torch.equal(pair[1], other[1])


def test_values_go_with_what_stands_for_them(tmp_path):
    cache = BoundedCache(100, str(tmp_path))
    small, large = cache.store(torch.zeros(20)), cache.store([torch.ones(50), 3])
    assert cache.used == 80
    assert large.load()[0].sum() == 50
    assert large.load()[1] == 3
    files = list(Path(tmp_path).rglob("*.pt"))
    assert len(files) == 1
    del large
    gc.collect()
    assert not files[0].exists()
    del small
    gc.collect()
    assert cache.used == 0
    del cache
    gc.collect()
    assert list(Path(tmp_path).iterdir()) == []


def test_what_is_read_no_more_is_let_go():
    qmodel = calibrated()
    cache = BoundedCache(PLENTY)
    batches = store_inputs(qmodel, [torch.randn(4, 3, 8, 8)], 4, cache)
    (region,) = regions(qmodel).values()
    floats, _ = activation_caches(qmodel, "", batches, cache)
    parts = find_blocks(region, "layers")
    alive = []
    for index, block in enumerate(parts):
        floats.advance(block)
        floats.release(parts[: index + 1])
        alive.append(len(floats.values[0]))
    assert max(alive) <= 2 < len(parts)


def test_inputs_are_cut_to_size():
    class Scaled(nn.Module):
        def forward(self, x, k=1):
            return x * k

    batches = [(torch.arange(5.0)[:, None], torch.zeros(5)), (torch.ones(2, 1), torch.zeros(2))]
    found = [stored.load() for stored in store_inputs(Scaled(), batches, 2, BoundedCache(PLENTY))]
    assert [args[0].flatten().tolist() for args, _ in found] == [[0, 1], [2, 3], [4], [1, 1]]
    assert len(store_inputs(Scaled(), batches, 2, BoundedCache(PLENTY), batches=1)) == 3
    named = [{"x": torch.ones(3, 1), "labels": torch.zeros(3), "k": 7}]
    found = [stored.load() for stored in store_inputs(Scaled(), named, 2, BoundedCache(PLENTY))]
    assert [(kwargs["x"].shape[0], kwargs["k"], set(kwargs)) for _, kwargs in found] == [
        (2, 7, {"x", "k"}), (1, 7, {"x", "k"}),
    ]  # fmt: skip
    with pytest.raises(CalibrationError, match="no batch"):
        store_inputs(Scaled(), iter(()), 2, BoundedCache(PLENTY))


def test_regions_get_what_the_python_between_them_makes():
    qmodel = calibrated(Halves())
    assert len(regions(qmodel)) == 2
    x = torch.randn(6, 3, 8, 8)
    found = walked(qmodel, x, BoundedCache(PLENTY), size=3)
    with torch.no_grad():
        expected = qmodel(x)
    assert torch.equal(torch.cat([q for _, q in found[-1]]), expected)
