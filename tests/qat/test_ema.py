"""The moving average of the weights: its values, its quantizers, and its state."""

import copy
import dataclasses
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven
from halfeven.checkpoint import save
from halfeven.errors import CheckpointError, ConfigError
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.pipelines import load, rebuild
from halfeven.placement.insertion import plan_of
from halfeven.qat.ema import AveragingOptions, WeightEMA, blend, warmed_up
from halfeven.quantization.model_quantizers import quantizers, set_observing
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.scheme import Scheme
from runtimes.parity import SCHEME


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, float("-inf")]), persistent=False)

    def forward(self, x):
        x = F.hardswish(self.norm(self.conv(x)))
        return self.head(F.relu(self.deep(x)).mean((2, 3))) + self.mask.exp() - 1


def batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 6, 6, generator=generator) + i for i in range(count)]


@functools.cache
def calibrated(**options):
    torch.manual_seed(0)
    qmodel = halfeven.prepare(Net(), batches()[0], **{"ranges": "learned", **options})
    return halfeven.calibrate(qmodel, batches()).train()


def quantized(**options):
    return copy.deepcopy(calibrated(**options))


def step(qmodel, optimizer, i):
    generator = torch.Generator().manual_seed(100 + i)
    x, y = torch.randn(6, 3, 6, 6, generator=generator) + 1, torch.randint(3, (6,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(qmodel(x), y).backward()
    optimizer.step()


def sgd(qmodel):
    return torch.optim.SGD(qmodel.parameters(), 0.1, momentum=0.9)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_blend_is_the_definition_in_every_dtype():
    averages = [torch.tensor([1.0, 2.0]), torch.tensor(3.0, dtype=torch.float64), torch.tensor([[4.0]])]
    values = [torch.tensor([3.0, 0.0]), torch.tensor(-1.0, dtype=torch.float64), torch.tensor([[8.0]])]
    kept = list(averages)
    blend(averages, values, 0.75)
    assert [a.tolist() for a in kept] == [[1.5, 1.5], 2.0, [[5.0]]], "in place"


def test_warm_up_ends_at_the_decay():
    assert [warmed_up(0.5, step) for step in (0, 1, 7, 8, 1000)] == [0.1, 2 / 11, 8 / 17, 0.5, 0.5]


@pytest.mark.parametrize("ranges", ["learned", "observed"])
def test_closed_form_after_a_few_steps(ranges):
    qmodel = quantized(ranges=ranges, scale_domain="log" if ranges == "learned" else "linear")
    average, optimizer, seen = WeightEMA(qmodel, AveragingOptions(decay=0.15)), sgd(qmodel), []
    for i in range(4):
        step(qmodel, optimizer, i)
        average.update(i)
        seen.append(state_of(qmodel))
    # (1 + step) / (10 + step) is 2/11 at step 1, so the decay is 0.15 from then on; the first step starts the average.
    d = 0.15
    shares = [d**3, (1 - d) * d**2, (1 - d) * d, 1 - d]
    found = average.model.state_dict()
    moved = 0
    for name, tensor in found.items():
        values = [one[name] for one in seen]
        if not tensor.is_floating_point():
            assert torch.equal(tensor, values[-1]), name
            continue
        wanted = sum(share * value for share, value in zip(shares, values, strict=True))
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
        moved += not torch.allclose(values[0], values[-1], rtol=1e-4, atol=1e-4)
    assert moved > 8
    assert any(name.endswith("running_var") for name in found)


def test_the_start_is_soon_forgotten():
    qmodel = nn.Linear(1, 1)
    average = WeightEMA(qmodel, AveragingOptions(decay=0.999))
    for i, value in enumerate((5.0, 1.0, 2.0)):
        nn.init.constant_(qmodel.weight, value)
        average.update(i)
    first = 5 * 2 / 11 + 1 * 9 / 11
    assert float(average.model.weight) == pytest.approx(first * 3 / 12 + 2 * 9 / 12)


def test_a_late_start_knows_nothing_of_what_was_before():
    qmodel = nn.Linear(1, 1)
    average = WeightEMA(qmodel, AveragingOptions(decay=0.999))
    nn.init.constant_(qmodel.weight, 7.0)
    average.update(5000)
    assert float(average.model.weight) == 7.0


def test_without_decay_it_is_the_raw_model():
    qmodel = quantized()
    average, optimizer = WeightEMA(qmodel, AveragingOptions()), sgd(qmodel)
    for i in range(3):
        step(qmodel, optimizer, i)
        average.update(i)
    assert_equal(state_of(average.model), state_of(qmodel))


def test_integers_and_constants_are_copied():
    qmodel = quantized(ranges="observed")
    average, optimizer = WeightEMA(qmodel, AveragingOptions(decay=0.9)), sgd(qmodel)
    for i in range(3):
        step(qmodel, optimizer, i)
        average.update(i)
    set_observing(qmodel, False)
    for quantizer in quantizers(qmodel).values():
        if not quantizer.scheme.symmetric:
            quantizer.zero_point.add_(1)
    average.update(3)
    assert int(average.model.norm.num_batches_tracked) == 3
    assert torch.equal(average.model.mask, qmodel.mask), "-inf stays"
    own = quantizers(average.model)
    assert any(not quantizer.scheme.symmetric for quantizer in own.values())
    for name, quantizer in quantizers(qmodel).items():
        assert own[name].zero_point.dtype == torch.int32
        assert torch.equal(own[name].zero_point, quantizer.zero_point)
        assert own[name].observing.dtype == torch.uint8
        assert not own[name].observing.any()
        assert not own[name].state.observing, "the weights' ranges are no longer those of the present weights"


def test_the_raw_model_is_not_touched_and_shares_nothing():
    qmodel = quantized()
    before = state_of(qmodel)
    average = WeightEMA(qmodel, AveragingOptions(decay=0.9))
    average.update(0)
    for tensor in (*average.model.parameters(), *average.model.buffers()):
        tensor.zero_()
    assert_equal(state_of(qmodel), before)
    assert qmodel.training
    assert all(parameter.requires_grad for parameter in qmodel.parameters())
    own = set(average.model.modules())
    assert own.isdisjoint(qmodel.modules())
    (source,) = average.model.head.input_quantizers
    assert source in own, "layers look at the average's own quantizers"


def test_the_average_is_a_quantized_model(tmp_path):
    qmodel = quantized(scheme="w4a4")
    average, optimizer = WeightEMA(qmodel, AveragingOptions(decay=0.9)), sgd(qmodel)
    for i in range(3):
        step(qmodel, optimizer, i)
        average.update(i)
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(quantizer.state.has_range for quantizer in quantizers(average.model).values())
    statistics = average.model.norm.running_mean.clone()
    re_estimate(average.model, batches())
    assert not torch.equal(average.model.norm.running_mean, statistics)
    assert not any(module.training for module in average.model.modules())
    outputs = average.model(batches()[0])
    assert outputs.isfinite().all()
    assert not torch.equal(outputs, qmodel.eval()(batches()[0]))
    save(average.model, tmp_path / "average.safetensors")
    loaded = load(tmp_path / "average.safetensors", Net(), batches()[0])
    assert torch.equal(loaded(batches()[0]), outputs)
    average.update(3)
    assert average.model(batches()[0]).isfinite().all()


def test_the_average_is_exported_as_it_computes(tmp_path):
    qmodel = quantized(scheme=SCHEME)
    average, optimizer = WeightEMA(qmodel, AveragingOptions(decay=0.9)), sgd(qmodel)
    for i in range(3):
        step(qmodel, optimizer, i)
        average.update(i)
    halfeven.export(average.model, tmp_path / "average.onnx")
    report = halfeven.verify(average.model, tmp_path / "average.onnx", batches(), timed=False)
    assert report.weights_match
    assert report.float_simulation_match > 0.99


def test_a_quantizer_with_other_bits_starts_anew():
    qmodel = quantized(scheme="w4a4")
    average, optimizer = WeightEMA(qmodel, AveragingOptions(decay=0.9)), sgd(qmodel)
    raw, mine = qmodel.head.weight_quantizer, average.model.head.weight_quantizer
    planned = raw.scheme
    raw.scheme = dataclasses.replace(planned, bits=8)
    halfeven.calibrate(qmodel, batches())
    for i in range(2):
        step(qmodel, optimizer, i)
        average.update(i)
    assert mine.scheme.bits == 8
    raw.scheme = planned
    halfeven.calibrate(qmodel, batches())
    average.update(2)
    assert mine.scheme == planned
    assert torch.equal(mine.scale, raw.scale), "a scale for 8 bits says nothing of one for 4"


def test_a_range_that_comes_later_starts_the_average():
    qmodel = nn.Sequential(nn.Linear(2, 2), Quantizer(Scheme()))
    average = WeightEMA(qmodel, AveragingOptions(decay=0.9))
    average.update(0)
    assert not average.model[1].state.has_range
    qmodel[1].set_range(torch.tensor(-1.0), torch.tensor(1.0))
    average.update(1)
    assert average.model[1].state.has_range
    assert torch.equal(average.model[1].scale, qmodel[1].scale)
    assert average.model(torch.ones(1, 2)).isfinite().all()


def test_tensors_that_are_replaced_are_followed():
    qmodel = quantized()
    average = WeightEMA(qmodel, AveragingOptions(decay=0.5))
    average.update(0)
    qmodel.norm.running_mean = torch.full((8,), 3.0)
    qmodel.conv.weight = nn.Parameter(qmodel.conv.weight.detach() + 1)
    average.update(20)
    assert average.model.norm.running_mean.gt(1).all()
    torch.testing.assert_close(average.model.conv.weight, qmodel.conv.weight.detach() - 0.5)


def test_the_average_follows_the_model_to_its_device():
    qmodel = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightEMA(qmodel, AveragingOptions(decay=0.5))
    average.update(0)
    qmodel.to("meta")
    average.update(1)
    assert {tensor.device.type for tensor in average.model.state_dict().values()} == {"meta"}


def test_a_tied_weight_is_averaged_once():
    qmodel = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    qmodel["b"].weight = qmodel["a"].weight
    nn.init.constant_(qmodel["a"].weight, 0.0)
    average = WeightEMA(qmodel, AveragingOptions(decay=0.5))
    average.update(20)
    nn.init.constant_(qmodel["a"].weight, 1.0)
    average.update(21)
    assert average.model["a"].weight is average.model["b"].weight
    assert float(average.model["a"].weight) == 0.5


@pytest.mark.parametrize("ranges", ["learned", "observed"])
@pytest.mark.parametrize("interrupted", [0, 3])
def test_a_resumed_run_goes_on_bit_for_bit(ranges, interrupted):
    def run(qmodel, optimizer, average, steps):
        for i in steps:
            set_observing(qmodel, i < 2)
            step(qmodel, optimizer, i)
            average.update(i)

    torch.manual_seed(0)
    qmodel = quantized(ranges=ranges)
    plan, optimizer = plan_of(qmodel), sgd(qmodel)
    average = WeightEMA(qmodel, AveragingOptions(decay=0.8))
    run(qmodel, optimizer, average, range(interrupted))
    file = io.BytesIO()
    torch.save([qmodel.state_dict(), optimizer.state_dict(), average.state_dict()], file)
    run(qmodel, optimizer, average, range(interrupted, 6))
    x = batches(seed=5)[0]
    outputs = average.model(x)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    again = rebuild(Net(), batches()[0], plan).train()  # not calibrated: the state brings the ranges
    resumed, second = WeightEMA(again, AveragingOptions(decay=0.8)), sgd(again)
    for one, state in zip((again, second, resumed), saved, strict=True):
        one.load_state_dict(state)
    run(again, second, resumed, range(interrupted, 6))
    assert_equal(state_of(resumed.model), state_of(average.model))
    assert torch.equal(resumed.model(x), outputs)


def test_resumption_knows_the_bits_that_were_averaged():
    qmodel = quantized(scheme="w4a4")
    planned = {name: quantizer.scheme for name, quantizer in quantizers(qmodel).items()}
    average = WeightEMA(qmodel, AveragingOptions(decay=0.9))
    for quantizer in quantizers(qmodel).values():
        quantizer.scheme = dataclasses.replace(quantizer.scheme, bits=8)
    halfeven.calibrate(qmodel, batches())
    average.update(0)
    resumed = WeightEMA(quantized(scheme="w4a4"), AveragingOptions(decay=0.9))
    resumed.load_state_dict(copy.deepcopy(average.state_dict()))
    assert {quantizer.scheme.bits for quantizer in quantizers(resumed.model).values()} == {8}
    assert {scheme.bits for scheme in planned.values()} != {8}


def test_the_state_of_another_model_is_refused():
    average = WeightEMA(nn.Linear(2, 2), AveragingOptions(decay=0.9))
    other = WeightEMA(nn.Linear(2, 3), AveragingOptions(decay=0.9))
    with pytest.raises(CheckpointError, match="size mismatch"):
        average.load_state_dict(other.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_wrong_decay_is_refused(decay):
    with pytest.raises(ConfigError, match=r"AveragingOptions\.decay=.*at least 0 and below 1"):
        AveragingOptions(decay=decay)
