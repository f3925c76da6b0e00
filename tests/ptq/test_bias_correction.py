"""Empirical bias correction gives every layer the mean of its float outputs."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import AlgorithmError, CalibrationError
from halfeven.layerwise.float_equivalence import float_function
from halfeven.ptq.bias_correction import channel_means, correct_biases
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.reconstruct import adaround
from nets import Halves, Residual, prepared


def data(seed=1):
    return torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(16)


def calibrated(model=None, scheme="w4a8", **options):
    torch.manual_seed(0)
    qmodel = prepared((model or Residual()).eval(), scheme=scheme, weight_observer="minmax", **options)
    return he.calibrate(qmodel, data()).eval()


def append_means(means, axis, module, args, output):
    means.append(channel_means(output, axis))


@torch.no_grad()
def output_means(qmodel, *, floats=False):
    """Mean of what each layer gives, [channels], over the data."""
    found, hooks = {}, []
    for name, module in qmodel.named_modules():
        if hasattr(module, "weight_quantizer"):
            axis = -1 if isinstance(module, nn.Linear) else 1
            means = found.setdefault(name, [])
            hooks.append(module.register_forward_hook(partial(append_means, means, axis)))
    for x in data():
        if floats:
            with float_function(qmodel):
                qmodel(x)
        else:
            qmodel(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


@pytest.mark.parametrize("scheme", ["w4a8", "w3a4"])
def test_every_layer_has_the_mean_of_its_float_form(scheme):
    qmodel = calibrated(scheme=scheme)
    wanted, before = output_means(qmodel, floats=True), output_means(qmodel)
    report = correct_biases(qmodel, data(), options=PTQOptions(batch_size=16))
    after = output_means(qmodel)
    for name, mean in wanted.items():
        assert torch.allclose(after[name], mean, atol=2e-6), name
        assert (before[name] - mean).abs().max() > 1e-4
    assert set(report.shifts) == set(wanted)
    assert all(1e-5 < share < 1 for share in report.shifts.values())
    assert "largest shift" in str(report)


class Levels(nn.Module):
    """A head that reads two levels, with a layer of each level's own between its calls, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.own = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in range(2))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        levels = (x, nn.functional.max_pool2d(x, 2))
        return [own(torch.relu(self.head(y))) for own, y in zip(self.own, levels, strict=True)]


@pytest.mark.parametrize("learned", [False, True])
def test_a_layer_that_is_called_twice_gets_one_shift_for_both(learned):
    qmodel = calibrated(Levels(), scheme="w3a8")
    reference = copy.deepcopy(qmodel) if learned else None
    wanted, before = output_means(qmodel, floats=True), output_means(qmodel)
    report = correct_biases(qmodel, data(), reference=reference)
    after = output_means(qmodel)
    assert report.shifts.keys() == wanted.keys() == {"stem", "head", "own.0", "own.1"}
    assert (before["head"] - wanted["head"]).abs().max() > 1e-3
    for name, mean in wanted.items():
        torch.testing.assert_close(after[name], mean, atol=2e-6, rtol=0)


def test_a_later_region_gets_the_means_of_the_float_model():
    qmodel = calibrated(Halves(), scheme="w3a8")
    wanted = output_means(qmodel, floats=True)
    correct_biases(qmodel, data())
    for name, mean in output_means(qmodel).items():
        torch.testing.assert_close(mean, wanted[name], atol=2e-6, rtol=0)


def test_layers_without_a_bias_are_given_one_that_is_saved(tmp_path):
    class NoBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.fc(self.conv(x).relu().mean((2, 3)))

    model = NoBias()
    qmodel = calibrated(model)
    correct_biases(qmodel, data())
    assert he.plan_of(qmodel).changes.given_biases == ("conv", "fc")
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", model, torch.zeros(2, 3, 8, 8))
    x = data(3)[0]
    assert torch.equal(loaded(x), qmodel(x))


def test_after_a_learned_rounding_it_needs_the_float_model():
    qmodel = calibrated()
    reference = copy.deepcopy(qmodel)
    wanted = output_means(reference, floats=True)
    adaround(qmodel, data(), options=PTQOptions(iterations=10))
    with pytest.raises(AlgorithmError, match="float weights"):
        correct_biases(qmodel, data())
    correct_biases(qmodel, data(), reference=reference)
    assert all(torch.allclose(mean, wanted[name], atol=2e-6) for name, mean in output_means(qmodel).items())


def test_no_data_is_an_error():
    with pytest.raises(CalibrationError, match="no batch"):
        correct_biases(calibrated(), [])
