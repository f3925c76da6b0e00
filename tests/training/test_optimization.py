"""Parameter groups and learning rates."""

import math

import pytest
import torch
from torch import nn

from halfeven.errors import ConfigError
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.scheme import Scheme
from halfeven.training.optimization import learning_rate, make_optimizer, parameter_groups
from halfeven.training.options import TrainingOptions


def net():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2, bias=False))
    model.quantizer = Quantizer(Scheme(), ranges="learned")
    return model


def names(model, group):
    table = {id(parameter): name for name, parameter in model.named_parameters()}
    return {table[id(parameter)] for parameter in group["params"]}


def test_scales_never_decay():
    model = net()
    decayed, learned = parameter_groups(model, TrainingOptions(weight_decay=0.1, decay_norms_and_biases=True))
    assert (decayed["weight_decay"], learned["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}
    assert names(model, learned) == {"quantizer.scale"}


def test_scales_that_learn_by_clipping_alone_decay():
    model = net()
    model.pact = Quantizer(Scheme(), ranges="clipped")
    *_, learned, clipped = parameter_groups(model, TrainingOptions(weight_decay=0.1, scale_rate=0.5))
    assert names(model, learned) == {"quantizer.scale"}
    assert names(model, clipped) == {"pact.scale"}
    assert (clipped["weight_decay"], clipped["rate"]) == (0.1, 0.5)


def test_scales_learn_more_slowly_under_sgd_alone():
    sgd = TrainingOptions(learning_rate=0.1, scale_rate=0.05)
    assert parameter_groups(net(), sgd)[-1]["lr"] == pytest.approx(0.005)
    adam = TrainingOptions(optimizer="adamw", learning_rate=0.1, scale_rate=0.05)
    assert parameter_groups(net(), adam)[-1]["lr"] == pytest.approx(0.1)


def test_norms_and_biases_are_spared_unless_asked():
    model = net()
    decayed, free, _ = parameter_groups(model, TrainingOptions())
    assert names(model, decayed) == {"0.weight", "2.weight"}
    assert names(model, free) == {"0.bias", "1.weight", "1.bias"}


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    assert all("0." not in name for group in parameter_groups(model, TrainingOptions()) for name in names(model, group))


def test_optimizers():
    assert isinstance(make_optimizer(net(), TrainingOptions(optimizer="adamw")), torch.optim.AdamW)
    assert make_optimizer(net(), TrainingOptions(momentum=0.8)).param_groups[0]["momentum"] == 0.8


def rates(options, total=100, per_epoch=10):
    return [learning_rate(step, total, per_epoch, options) for step in range(total)]


def test_constant():
    assert set(rates(TrainingOptions(schedule="constant", learning_rate=0.3))) == {0.3}


def test_cosine_equals_pytorchs():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(TrainingOptions(schedule="cosine", learning_rate=0.3)) == pytest.approx(expected)


def test_cosine_by_epoch():
    found = rates(TrainingOptions(schedule="cosine", schedule_by="epoch", learning_rate=1.0))
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * (step // 10) / 10)) for step in range(100)])


def test_warmup_rises_linearly_then_the_schedule_starts():
    found = rates(TrainingOptions(warmup_steps=4, learning_rate=1.0, schedule="cosine"))
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[-1] < 0.001


def test_step_schedule():
    found = rates(TrainingOptions(schedule="step", step_epochs=(3, 6), step_factor=0.5, learning_rate=1.0))
    assert [found[0], found[29], found[30], found[59], found[60]] == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), r"batch_size=0 must be an integer \(at least 1\)"),
        (dict(epochs=-1, save_every=0), r"(?s)epochs=-1.*save_every=0"),
        (dict(schedule="step"), "without step_epochs"),
        (dict(step_epochs=(1,)), "no effect"),
        (dict(label_smoothing=1.0), "label_smoothing=1.0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingOptions(**options)
