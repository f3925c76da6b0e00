"""NaN and infinity in training: nothing of it is saved, and the error says where it began."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.checkpoint import save_weights
from halfeven.errors import CheckpointError, ConfigError
from halfeven.tasks import Classification
from halfeven.training.accelerator import DeviceOptions, make_accelerator
from halfeven.training.finite import LossWatch, damage_in, first_not_finite, not_finite
from halfeven.training.options import TrainingOptions
from halfeven.training.state import load_state, save_state
from halfeven.training.trainer import Run, Trainer

OPTIONS = TrainingOptions(epochs=2, batch_size=8, learning_rate=0.01, save_every=2, log_every=1000)
BAD = 17
"""The sample that holds NaN."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def samples(bad=None):
    images = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    if bad is not None:
        images[bad, 0, 1, 1] = torch.nan
    return [(image, number % 2) for number, image in enumerate(images)]


def trainer(folder, data, *, options=OPTIONS, ranges=None, model=None):
    torch.manual_seed(0)
    model = model or Net()
    if ranges is not None:
        model = he.prepare(model, torch.zeros(2, 1, 4, 4), ranges=ranges)
        he.calibrate(model, [torch.stack([image for image, _ in samples()])])
    run = Run(
        folder=folder,
        accelerator=make_accelerator(DeviceOptions(kind="cpu")),
        console=Console(file=io.StringIO()),
    )
    return Trainer(
        model,
        data,
        options,
        run,
        task=Classification(2),
        validate=lambda model: {"top1": 50.0},
        save=save_weights,
    )


def step_of(one, sample):
    """The step, from 1, in whose batch a sample comes first."""
    batches = range(len(one.batches))
    return 1 + next(number for number in batches if sample in one.batches.indices(0, number))


@pytest.mark.parametrize("ranges", [None, "learned", "clipped", "calibrated", "observed"])
def test_the_state_before_stays_and_the_error_names_step_and_sample(tmp_path, ranges):
    one = trainer(tmp_path, samples(BAD), ranges=ranges)
    step = step_of(one, BAD)
    with pytest.raises(ConfigError) as error:
        one.run()
    assert f"step {step} (epoch 1, batch {step} of 6)" in str(error.value)
    assert f"training sample {BAD} " in str(error.value)
    state = load_state(tmp_path / "state.pt")
    assert state.step == (step - 1) // 2 * 2, "the last save before the batch"
    assert not not_finite(state.model)
    assert f"still holds step {state.step}" in str(error.value)
    assert not list(tmp_path.glob("*.safetensors")), "neither best nor last was written of such weights"
    outcome = trainer(tmp_path, samples(), ranges=ranges).run(resume=True)
    assert outcome.steps == 12, "with mended data the run goes on"


def test_no_step_of_an_epoch_is_too_late_to_notice(tmp_path):
    options = dataclasses.replace(OPTIONS, save_every=1000)
    one = trainer(tmp_path, samples(BAD), options=options)
    with pytest.raises(ConfigError, match=f"loss became nan at step {step_of(one, BAD)} "):
        one.run()
    assert load_state(tmp_path / "state.pt").step == 0


def test_a_batch_of_an_accumulated_step_is_named(tmp_path):
    options = dataclasses.replace(OPTIONS, accumulation=3)
    one = trainer(tmp_path, samples(BAD), options=options)
    batch = step_of(one, BAD)
    with pytest.raises(ConfigError, match=rf"step {-(-batch // 3)} \(epoch 1, batch {batch} of 6\)"):
        one.run()


class Divides(Net):
    """Divides by zero for the samples whose mean is above a threshold."""

    def forward(self, x):
        return super().forward(self.scaled(x))

    def scaled(self, x):
        return x / (x.mean((1, 2, 3), keepdim=True) < 0.4)


def test_a_tensor_inside_the_model_is_named(tmp_path):
    one = trainer(tmp_path, samples(), model=Divides())
    with pytest.raises(ConfigError, match=r"first tensor .* is the output of conv \(Conv2d\), computed of finite"):
        one.run()


class RootOfZero(Net):
    """Its loss is finite, and the gradient of its last layer's bias is not."""

    def forward(self, x):
        return super().forward(x) + torch.sqrt(0 * self.head.bias)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_are_looked_at_and_not_the_loss_alone(tmp_path, optimizer):
    options = dataclasses.replace(OPTIONS, save_every=1, optimizer=optimizer)
    one = trainer(tmp_path, samples(), options=options, model=RootOfZero())
    with pytest.raises(ConfigError, match=r"filled head\.bias.* by step 1,.* the gradient of head\.bias"):
        one.run()
    assert load_state(tmp_path / "state.pt").step == 0


def test_weights_that_grow_too_fast_are_told_from_bad_data(tmp_path):
    class Free(Net):
        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3))) ** 3

    options = dataclasses.replace(OPTIONS, learning_rate=1e6, save_every=1000)
    with pytest.raises(ConfigError, match=r"weights .*have grown since\. Lower training\.learning_rate"):
        trainer(tmp_path, samples(), options=options, model=Free()).run()


def test_minus_infinity_of_a_mask_is_no_fault(tmp_path):
    model = Net()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    trainer(tmp_path, samples(), model=model).run()
    again = Net()
    again.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert trainer(tmp_path, samples(), model=again).run(resume=True).steps == 12


@pytest.mark.parametrize("part", ["conv.weight", "conv.weight_quantizer.scale", "momentum"])
def test_a_state_that_holds_nan_is_not_resumed(tmp_path, part):
    trainer(tmp_path, samples(), ranges="learned").run()
    state = load_state(tmp_path / "state.pt")
    if part == "momentum":
        state.optimizer["state"][0]["momentum_buffer"].fill_(torch.nan)
    else:
        state.model[part].fill_(torch.nan)
    save_state(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=rf"of step 12, holds NaN or infinity in .*{part}"):
        trainer(tmp_path, samples(), ranges="learned").run(resume=True)


def test_the_first_loss_is_remembered():
    watch = LossWatch("cpu")
    for place, loss in enumerate([1.0, torch.inf, torch.nan, 2.0]):
        watch.see(torch.tensor(loss), place)
    assert (watch.first(), watch.loss()) == (1, torch.inf)


def test_a_finite_model_has_no_such_tensor():
    class Objective(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()

        def forward(self, inputs, targets):
            return F.cross_entropy(self.model(inputs), targets)

    objective = Objective()
    images, targets = torch.randn(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)
    assert first_not_finite(objective, images, targets) == ""
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert not damage_in(objective.state_dict(), {}, objective.state_dict())
