"""Freezing BatchNorm."""

import pytest
import torch

from halfeven.errors import ConfigError
from halfeven.qat.batchnorm_schedule import ScheduleOptions, freeze_batchnorms, schedule
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.scheme import Scheme
from nets import growing_batches as batches
from nets import normalized as net


def test_frozen_statistics_stay_and_affine_learns():
    model = net().train()
    model(batches()[0])
    kept = model[1].running_mean.clone(), model[1].running_var.clone()
    freeze_batchnorms(model)
    model(batches()[1]).sum().backward()
    assert torch.equal(model[1].running_mean, kept[0])
    assert torch.equal(model[1].running_var, kept[1])
    assert model[1].weight.grad is not None
    assert model[3].training, "only BatchNorm is frozen"
    model.train()
    model(batches()[1])
    assert not torch.equal(model[1].running_mean, kept[0]), "train() thaws it"


def test_schedule_freezes_when_due():
    model = net()
    model.quantizer = Quantizer(Scheme())
    before_step = schedule(ScheduleOptions(freeze_batchnorm_after=0.5, stop_observing_after=0.75))
    states = []
    for step in range(4):
        model.train()
        before_step(model, step / 4)
        states.append((model[1].training, bool(model.quantizer.observing)))
    assert states == [(True, True), (True, True), (False, True), (False, False)]


def test_never_and_at_once():
    model = net().train()
    schedule(ScheduleOptions(freeze_batchnorm_after=1))(model, 0.999)
    assert model[1].training
    schedule(ScheduleOptions(freeze_batchnorm_after=0))(model, 0.0)
    assert not model[1].training


@pytest.mark.parametrize(
    "options", [{"freeze_batchnorm_after": 1.5}, {"stop_observing_after": -1}, {"re_estimate_batches": 0}]
)
def test_wrong_shares_are_refused(options):
    with pytest.raises(ConfigError, match=r"ScheduleOptions\."):
        ScheduleOptions(**options)
