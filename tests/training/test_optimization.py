"""Parameter groups and learning rates."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

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


def test_biases_of_recurrent_layers_and_of_attention_are_biases():
    model = nn.ModuleDict({"rnn": nn.GRU(2, 2, bidirectional=True), "attention": nn.MultiheadAttention(2, 1)})
    decayed, free = parameter_groups(model, TrainingOptions())
    assert all("weight" in name for name in names(model, decayed))
    assert {"rnn.bias_ih_l0", "rnn.bias_hh_l0_reverse", "attention.in_proj_bias"} < names(model, free)


def test_a_model_that_is_frozen_as_a_whole_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainingOptions())


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    assert all("0." not in name for group in parameter_groups(model, TrainingOptions()) for name in names(model, group))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_each_name_makes_its_optimizer(name, kind):
    assert type(make_optimizer(net(), TrainingOptions(optimizer=name))) is kind


def test_momentum_reaches_the_optimizer():
    groups = make_optimizer(net(), TrainingOptions(momentum=0.8, nesterov=True)).param_groups
    assert all((group["momentum"], group["nesterov"]) == (0.8, True) for group in groups)
    assert make_optimizer(net(), TrainingOptions(optimizer="rmsprop", momentum=0.7)).param_groups[0]["momentum"] == 0.7


def stepped(model, optimizer, steps):
    """Take steps on gradients that depend on the parameters alone."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone() + 1
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_scales_may_have_an_optimizer_of_their_own():
    options = TrainingOptions(learning_rate=0.1, momentum=0.9, scale_optimizer="adam", scale_rate=0.01)
    torch.manual_seed(0)
    model = net()
    model.quantizer.scale.data.fill_(1.0)
    mine = copy.deepcopy(model)
    joined = make_optimizer(model, options)
    weights = [p for name, p in mine.named_parameters() if name != "quantizer.scale"]
    norms = [mine[0].bias, mine[1].weight, mine[1].bias]
    decayed = [p for p in weights if not any(p is norm for norm in norms)]
    sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": norms, "weight_decay": 0}], lr=0.1, momentum=0.9
    )
    adam = torch.optim.Adam([mine.quantizer.scale], lr=0.001)
    for _ in range(3):
        for parameter in mine.parameters():
            parameter.grad = parameter.detach().clone() + 1
        sgd.step()
        adam.step()
    found = stepped(model, joined, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, mine.parameters(), strict=True))


def test_the_state_of_joined_optimizers_goes_through_a_file(tmp_path):
    options = TrainingOptions(learning_rate=0.1, scale_optimizer="adam")
    model = net()
    model.quantizer.scale.data.fill_(1.0)
    first = make_optimizer(model, options)
    stepped(model, first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(model)
    second = make_optimizer(again, options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, two in zip(stepped(model, first, 2), stepped(again, second, 2), strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_for_scales_needs_scales():
    with pytest.raises(ConfigError, match="this model has none"):
        make_optimizer(nn.Linear(2, 2), TrainingOptions(scale_optimizer="adam"))


def rates(options, total=100, per_epoch=10):
    return [learning_rate(step, total, per_epoch, options) for step in range(total)]


def test_a_constant_rate_stays():
    assert set(rates(TrainingOptions(schedule="constant", learning_rate=0.3))) == {0.3}


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (dict(schedule="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=100)),
        (dict(schedule="cosine", end_rate=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=100, eta_min=0.03)),
        (
            dict(schedule="linear", end_rate=0.2),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=100),
        ),
        (
            dict(schedule="polynomial", polynomial_power=2.0),
            lambda o: lr_scheduler.PolynomialLR(o, total_iters=100, power=2.0),
        ),
        (dict(schedule="onecycle"), lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=100)),
        (
            dict(schedule="onecycle", onecycle_rise=0.5),
            lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=100, pct_start=0.5),
        ),
    ],
)
def test_schedules_equal_pytorchs(options, make):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    scheduler = make(optimizer)
    expected = []
    for step in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 99:
            scheduler.step()
    assert rates(TrainingOptions(learning_rate=0.3, **options)) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "onecycle"])
def test_short_runs_have_finite_rates(schedule, total):
    found = rates(TrainingOptions(learning_rate=1.0, schedule=schedule), total=total, per_epoch=1)
    assert all(0 <= rate <= 1 for rate in found)
    assert max(found) > 0


def test_onecycle_reaches_the_highest_rate_where_it_rises_in_a_single_step():
    assert rates(TrainingOptions(schedule="onecycle", onecycle_rise=0.5, learning_rate=1.0), total=2)[0] == 1.0


def test_a_rate_that_moves_between_epochs_alone():
    found = rates(TrainingOptions(schedule="cosine", schedule_by="epoch", learning_rate=1.0))
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * (step // 10) / 10)) for step in range(100)])
    line = rates(TrainingOptions(schedule="linear", schedule_by="epoch", learning_rate=1.0))
    assert line == pytest.approx([1 - step // 10 / 10 for step in range(100)])


def test_warmup_rises_linearly_then_the_schedule_starts():
    found = rates(TrainingOptions(warmup_steps=4, learning_rate=1.0, schedule="cosine"))
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[-1] < 0.001


def test_a_step_schedule_lowers_the_rate_at_its_epochs():
    found = rates(TrainingOptions(schedule="step", step_epochs=(3, 6), step_factor=0.5, learning_rate=1.0))
    assert [found[0], found[29], found[30], found[59], found[60]] == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), r"batch_size=0 must be an integer \(at least 1\)"),
        (dict(epochs=-1, save_every=0), r"(?s)epochs=-1.*save_every=0"),
        (dict(schedule="step"), "without step_epochs"),
        (dict(step_epochs=(1,)), "no effect"),
        (dict(schedule="constant", end_rate=0.1), "end_rate=0.1 would have no effect"),
        (dict(schedule="constant", schedule_by="epoch"), "schedule_by='epoch' would have no effect"),
        (dict(polynomial_power=2.0), 'or set schedule="polynomial"'),
        (dict(schedule="onecycle", warmup_steps=5), "rises by itself"),
        (dict(optimizer="adam", nesterov=True), "nesterov=True would have no effect"),
        (dict(nesterov=True, momentum=0.0), "looks ahead"),
        (dict(optimizer="adam", momentum=0.5), "momentum=0.5 would have no effect"),
        (dict(step_factor=0.5), 'or set schedule="step"'),
        (dict(label_smoothing=1.0), "label_smoothing=1.0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingOptions(**options)
