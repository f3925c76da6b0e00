"""Re-estimating BatchNorm."""

import pytest
import torch
from torch import nn

from halfeven.errors import CalibrationError
from halfeven.layerwise.re_estimate import re_estimate
from nets import growing_batches as batches
from nets import normalized as net


def test_re_estimation_is_the_mean_of_single_batches():
    model = net().train()
    model(batches()[3])
    outputs = [model[0](batch).transpose(0, 1).flatten(1) for batch in batches(3)]
    re_estimate(model, [(batch, None) for batch in batches()], batches=3)
    torch.testing.assert_close(model[1].running_mean, torch.stack([o.mean(1) for o in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([o.var(1) for o in outputs]).mean(0))


def test_re_estimation_leaves_everything_else():
    model = net().train()
    model(batches()[0])
    model[1].momentum = 0.25
    model[1].eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    re_estimate(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.25
    assert int(model[1].num_batches_tracked) == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_re_estimation_takes_dicts_of_inputs():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, *, x):
            return self.norm(x)

    model = Keyword()
    model(x=torch.zeros(2, 2))
    model.linear = nn.Linear(1, 1)
    re_estimate(model, [{"x": torch.tensor([[0.0, 2.0], [2.0, 4.0]])}])
    assert torch.equal(model.norm.running_mean, torch.tensor([1.0, 3.0]))


def test_an_empty_loader_is_refused_and_nothing_changed():
    model = net()
    model(batches()[0])
    kept = model[1].running_mean.clone()
    with pytest.raises(CalibrationError, match="no batch"):
        re_estimate(model, [])
    assert torch.equal(model[1].running_mean, kept)


def test_a_model_without_batchnorm_needs_nothing():
    model = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    re_estimate(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
