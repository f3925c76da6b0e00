"""Steps on large feature maps read few samples, steps on small ones all of the batch."""

import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.layerwise.blocks import find_blocks
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction import minibatches
from halfeven.ptq.reconstruction.minibatches import cut_samples, samples_of_a_step
from halfeven.ptq.reconstruction.reconstruct import adaround


def pyramid() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_samples_follow_the_positions_of_a_block(monkeypatch):
    monkeypatch.setattr(minibatches, "POSITIONS_OF_A_STEP", 1024)
    qmodel = he.prepare(pyramid(), torch.randn(2, 3, 16, 16))
    counts = [samples_of_a_step(block) for block in find_blocks(qmodel, "layers")]
    assert counts == [4, 64, 1024]  # 256, 16 and 1 positions
    monkeypatch.setattr(minibatches, "POSITIONS_OF_A_STEP", 8)
    assert samples_of_a_step(find_blocks(qmodel, "layers")[0]) == minibatches.MIN_SAMPLES


def test_the_values_of_a_batch_are_cut_together():
    x = torch.arange(10.0)
    generator = torch.Generator().manual_seed(0)
    first, second = cut_samples(({"a": x, "b": x[:, None]}, {"c": -x}), 3, generator)
    assert len(first["a"]) == 3
    assert torch.equal(first["a"], first["b"].flatten())
    assert torch.equal(first["a"], -second["c"])
    starts = {int(cut_samples(({"a": x},), 3, generator)[0]["a"][0]) for _ in range(40)}
    assert starts == set(range(8))


def test_values_that_cannot_be_cut_stay():
    x, generator = torch.arange(10.0), torch.Generator().manual_seed(0)
    before = generator.get_state()
    for parts in (({"a": x}, {"b": x[:6]}), ({"a": x, "n": 10},), ({"a": x[:3]},), ({"a": torch.tensor(1.0)},)):
        assert cut_samples(parts, 3, generator) is parts
    assert torch.equal(generator.get_state(), before)


def test_rounding_is_learned_from_few_samples_a_step(monkeypatch):
    monkeypatch.setattr(minibatches, "POSITIONS_OF_A_STEP", 1024)
    x = F.interpolate(torch.randn(32, 3, 4, 4), size=(16, 16), mode="bilinear")  # neighbours are alike
    qmodel = he.prepare(pyramid(), x[:2], scheme="w4a8", batchnorm="fold")
    he.calibrate(qmodel, [x])
    report = adaround(qmodel, [x], options=PTQOptions(rounding_rate=0.05))
    assert report.blocks[0].after > report.blocks[0].before + 1
