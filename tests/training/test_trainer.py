"""The loop on small float models: it learns, logs, keeps the best, accumulates and resumes exactly."""

import dataclasses
import io
import json
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from halfeven.checkpoint import save_weights
from halfeven.errors import CheckpointError, ConfigError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.tasks import Classification
from halfeven.training.accelerator import DeviceOptions, make_accelerator
from halfeven.training.callback import TrainerCallback
from halfeven.training.options import TrainingOptions
from halfeven.training.trainer import Run, Trainer

OPTIONS = TrainingOptions(epochs=3, batch_size=8, learning_rate=0.1, save_every=3, log_every=1)


def images(count=48):
    """Two classes told apart by the sign of their mean, with a little noise in each draw."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 1, 4, 4, generator=generator)
    labels = torch.arange(count) % 2
    return [(v + 2 * float(y) - 1, y) for v, y in zip(values, labels, strict=True)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


class Killed(BaseException):
    """Stands for the end of the process."""


def callback(**hooks):
    """A callback with some hooks: functions, or the values of its properties."""
    given = {name: staticmethod(hook) if callable(hook) else hook for name, hook in hooks.items()}
    return type("Hooks", (TrainerCallback,), given)()


def trainer(folder, options=OPTIONS, *, data=None, console=None, hooks=None, calls=None, **run):
    """A trainer of a small net; `calls` are what it is given besides hooks, such as `validate`."""
    torch.manual_seed(0)
    data = data or images()
    calls = {
        "task": Classification(2),
        "validate": lambda model: evaluate(model, evaluation_loader(data, 16), Classification(2)),
        "save": save_weights,
        "callback": callback(**(hooks or {})),
        **(calls or {}),
    }
    run = {"accelerator": make_accelerator(DeviceOptions(kind="cpu")), **run} if "accelerator" not in run else run
    place = Run(folder=folder, console=console or Console(file=io.StringIO()), **run)
    return Trainer(Net(), data, options, place, **calls)


def weights(one):
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_logs(tmp_path):
    out = io.StringIO()
    one = trainer(tmp_path, console=Console(file=out, width=120), name="float")
    outcome = one.run()
    assert outcome.steps == 18
    assert outcome.last["top1"] > 90
    records = log(tmp_path)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 18
    assert losses[-1] < 0.5 * losses[0]
    assert [record["step"] for record in records if "float" in record] == [6, 12, 18]
    assert records[-1]["float"] == outcome.last
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    assert out.getvalue().count("float: top1") == 3


def test_best_is_the_best(tmp_path):
    values = iter([50.0, 80.0, 70.0])
    kept = []
    calls = {
        "validate": lambda model: {"top1": next(values)},
        "save": lambda m, path, facts: (kept.append((path.name, facts)), path.touch()),
    }
    one = trainer(tmp_path, calls=calls)
    outcome = one.run()
    assert (outcome.best, outcome.last) == ({"top1": 80.0}, {"top1": 70.0})
    assert [facts["epoch"] for name, facts in kept if "best" in name] == [1, 2]
    assert [facts["epoch"] for name, facts in kept if "last" in name] == [1, 2, 3]


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        *((step, {}) for step in (0, 1, 4, 6, 7, 17)),
        (7, dict(optimizer="adam", schedule="onecycle")),
        (8, dict(nesterov=True, schedule="linear", validate_every=4)),
        (11, dict(optimizer="rmsprop", learning_rate=0.01, schedule="polynomial", validate_every=9)),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, step, changes):
    options = dataclasses.replace(OPTIONS, **changes)
    whole = trainer(tmp_path / "whole", options)
    whole.run()

    def kill(model, done):
        if round(done * 18) == step:
            raise Killed

    cut = trainer(tmp_path / "cut", options, hooks={"before_step": kill})
    with pytest.raises(Killed):
        cut.run()
    resumed = trainer(tmp_path / "cut", options)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        outcome = resumed.run(resume=True)
    assert equal(weights(resumed), weights(whole))
    assert (outcome.best, outcome.last) == (whole.best, whole.last)

    def strip(records):
        return [{k: v for k, v in record.items() if k not in ("time", "samples_per_second")} for record in records]

    assert strip(log(tmp_path / "cut")) == strip(log(tmp_path / "whole")), (
        "the log tells of one run, without repetition"
    )


class DrawsItself(Net):
    """Draws from Python and NumPy in training, as models that mask or leave out layers by their own code do."""

    def forward(self, x):
        factor = 0.5 + random.random() * np.random.rand() if self.training else 1.0
        return super().forward(x * factor)


def test_a_resumed_run_repeats_what_the_model_draws_from_python_and_numpy(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Net", DrawsItself)
    whole = trainer(tmp_path / "whole")
    whole.run()

    def kill(model, done):
        if round(done * 18) == 7:
            raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path / "cut", hooks={"before_step": kill}).run()
    resumed = trainer(tmp_path / "cut")
    resumed.run(resume=True)
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 8, 12, 16, 18]), (12, [12, 18]), (100, [18])])
def test_validations_are_as_often_as_asked(tmp_path, every, steps):
    one = trainer(tmp_path, dataclasses.replace(OPTIONS, validate_every=every), name="float")
    modes = []
    one.model.norm.register_forward_hook(lambda module, args, output: modes.append(module.training))
    one.run()
    assert [record["step"] for record in log(tmp_path) if "float" in record] == steps
    assert sum(modes) == 18, "training goes on in training mode after a validation"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = trainer(tmp_path)
    outcome = first.run()
    again = trainer(tmp_path)
    assert again.run(resume=True) == outcome
    assert equal(weights(again), weights(first))


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(CheckpointError, match="batch_size 8 then, 4 now"):
        trainer(tmp_path, TrainingOptions(epochs=3, batch_size=4)).run(resume=True)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """Without BatchNorm and dropout the mean gradient of two halves is that of the whole."""

    def run(name, options):
        one = trainer(tmp_path / name, options)
        one.model.norm, one.model.drop = nn.Identity(), nn.Identity()
        calls = {"task": one.task, "validate": one.validate, "save": one.save}
        one = Trainer(one.model, images(), options, one.where, **calls)
        one.run()
        return weights(one)

    small = run("small", TrainingOptions(epochs=2, batch_size=8, accumulation=2, learning_rate=0.1))
    large = run("large", TrainingOptions(epochs=2, batch_size=16, learning_rate=0.1))
    for name, tensor in small.items():
        torch.testing.assert_close(tensor, large[name])


def test_max_steps_cuts_the_run_and_its_schedule(tmp_path):
    one = trainer(tmp_path, TrainingOptions(epochs=3, batch_size=8, max_steps=4, learning_rate=1.0, log_every=1))
    assert one.run().steps == 4
    rates = [record["learning_rate"] for record in log(tmp_path) if "loss" in record]
    assert len(rates) == 4
    assert rates[2] == pytest.approx(0.5)


def test_clipping_bounds_the_step(tmp_path):
    options = TrainingOptions(
        epochs=1,
        batch_size=8,
        max_steps=1,
        learning_rate=1.0,
        momentum=0,
        weight_decay=0,
        clip_norm=0.01,
        schedule="constant",
    )
    one = trainer(tmp_path, options)
    before = [parameter.detach().clone() for parameter in one.model.parameters()]
    one.run()
    moved = torch.cat([(a - b).flatten() for a, b in zip(one.model.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.01, rel=1e-3)


def test_hooks_survive_the_trainers_own_train_calls(tmp_path):
    seen = []

    def freeze(model, done):
        assert model.training
        model.norm.eval()
        seen.append(done)

    one = trainer(tmp_path, hooks={"before_step": freeze})
    before = one.model.norm.running_mean.clone()
    one.run()
    assert torch.equal(one.model.norm.running_mean, before)
    assert seen == pytest.approx([step / 18 for step in range(18)])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match="loss became nan at step 1"):
        trainer(tmp_path, data=[(image * float("nan"), label) for image, label in images()]).run()


@pytest.fixture
def bfloat16():
    """An accelerator in mixed precision; Accelerate keeps one state for the whole process, which is put back after."""
    AcceleratorState._reset_state()
    yield make_accelerator(DeviceOptions(kind="cpu", precision="bfloat16"))
    AcceleratorState._reset_state()


def test_mixed_precision_computes_in_bfloat16_and_leaves_the_model_alone(tmp_path, bfloat16):
    dtypes = set()
    one = trainer(tmp_path, accelerator=bfloat16)
    one.model.conv.register_forward_hook(lambda module, args, output: dtypes.add((module.training, output.dtype)))
    before = weights(one)
    one.run()
    assert (True, torch.bfloat16) in dtypes
    assert "forward" not in vars(one.model), "the model's own forward is not wrapped"
    after = weights(one)
    assert after["conv.weight"].dtype == torch.float32
    assert not torch.equal(after["conv.weight"], before["conv.weight"])


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(ConfigError, match="loses small gradients"):
        make_accelerator(DeviceOptions(kind="cpu", precision="float16"))


def test_a_model_that_cannot_be_compiled_is_refused(monkeypatch):
    monkeypatch.setattr("halfeven.training.accelerator.compiler_works", lambda: False)
    with pytest.raises(ConfigError, match=r"device\.compile=True"):
        make_accelerator(DeviceOptions(compile=True))


def test_tf32_is_switched_for_products_and_convolutions():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for on in (True, False):
            make_accelerator(DeviceOptions(kind="cpu", tf32=on))
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (on, on)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_gpu_that_is_insisted_on_and_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r'device\.kind="cuda" asks for a GPU, and PyTorch .* finds none'):
        make_accelerator(DeviceOptions(kind="cuda"))


def test_a_gpu_that_accelerate_would_not_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.Accelerator", lambda **given: Mock(device=torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"Accelerate was set up for the cpu"):
        make_accelerator(DeviceOptions(kind="cuda"))


# What accompanies a training


def test_another_form_of_the_model_is_validated_and_kept_if_it_is_the_best(tmp_path):
    values = iter([50.0, 60.0, 70.0, 65.0, 40.0, 45.0])
    other = Net()
    kept = []
    calls = {
        "validate": lambda model: {"top1": next(values)},
        "save": lambda m, path, facts: (kept.append((path.name, m is other, facts)), path.touch()),
    }
    one = trainer(tmp_path, calls=calls, hooks={"other_models": {"average": other}})
    assert one.run().best == {"top1": 70.0}
    best = [(is_other, facts["epoch"]) for name, is_other, facts in kept if "best" in name]
    assert best == [(False, 1), (True, 1), (False, 2)]
    assert not any(is_other for name, is_other, _ in kept if "last" in name)
    averages = [record["quantized, average"]["top1"] for record in log(tmp_path) if "quantized, average" in record]
    assert averages == [60.0, 65.0, 45.0]


@pytest.mark.parametrize(("reached", "best", "epoch"), [(80.0, 85.0, 0), (85.0, 85.0, 1), (90.0, 90.0, 1)])
def test_the_start_is_the_best_until_training_reaches_as_much(tmp_path, reached, best, epoch):
    kept, said = [], io.StringIO()
    calls = {
        "validate": lambda model: {"top1": reached},
        "save": lambda m, path, facts: (kept.append((path.name, facts["epoch"])), path.touch()),
        "start": {"top1": 85.0},
    }
    one = trainer(tmp_path, dataclasses.replace(OPTIONS, epochs=1), console=Console(file=said), calls=calls)
    assert one.run().best == {"top1": best}
    assert [e for name, e in kept if "best" in name][-1] == epoch
    assert ("the start is kept" in " ".join(said.getvalue().split())) is (epoch == 0)


def test_of_trained_models_as_good_as_each_other_the_first_stays_the_best_also_in_a_resumed_run(tmp_path):
    kept = []
    calls = {
        "validate": lambda model: {"top1": 85.0},
        "save": lambda m, path, facts: (kept.append((path.name, facts["epoch"])), path.touch()),
        "start": {"top1": 85.0},
    }

    def kill(model, done):
        if round(done * 18) == 13:
            raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path, calls=calls, hooks={"before_step": kill}).run()
    trainer(tmp_path, calls=calls).run(resume=True)
    assert [epoch for name, epoch in kept if "best" in name] == [0, 1]


def test_no_advice_is_given_where_nothing_can_be_gained(tmp_path):
    said = io.StringIO()
    calls = {"validate": lambda model: {"top1": 99.0}, "start": {"top1": 100.0}}
    trainer(tmp_path, console=Console(file=said, width=200), calls=calls).run()
    assert "the start is kept as the best.\n" in said.getvalue()


def test_a_validation_before_the_model_is_what_it_shall_be_does_not_count(tmp_path):
    values = iter([90.0, 80.0, 70.0])
    kept = []
    calls = {
        "validate": lambda model: {"top1": next(values)},
        "save": lambda m, path, facts: (kept.append((path.name, facts["epoch"])), path.touch()),
    }
    one = trainer(tmp_path, calls=calls, hooks={"counts_from": 0.5})
    assert one.run().best == {"top1": 80.0}
    assert {epoch for _, epoch in kept} == {2, 3}


def test_a_validation_at_the_very_step_that_brings_the_final_form_is_of_the_form_before(tmp_path):
    values = iter([90.0, 80.0, 70.0])
    kept = []
    calls = {
        "validate": lambda model: {"top1": next(values)},
        "save": lambda m, path, facts: (kept.append((path.name, facts["epoch"])), path.touch()),
    }
    # The first epoch ends at a third of the run; the model changes before the next step.
    one = trainer(tmp_path, calls=calls, hooks={"counts_from": 1 / 3})
    assert one.run().best == {"top1": 80.0}
    assert {epoch for _, epoch in kept} == {2, 3}


def test_a_run_whose_model_never_gets_its_final_form_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"final form after 95%.*none of its 18 steps"):
        trainer(tmp_path, hooks={"counts_from": 0.95})


def test_any_number_is_better_than_none(tmp_path):
    values = iter([float("nan"), 40.0, float("nan")])
    calls = {"validate": lambda model: {"top1": next(values)}, "start": {"top1": float("nan")}}
    assert trainer(tmp_path, calls=calls).run().best == {"top1": 40.0}


def test_the_loss_of_the_callback_and_its_penalty_are_what_is_minimized(tmp_path):
    seen = []
    loss = {"loss": lambda outputs, images, labels, task: 0 * task, "penalty": lambda done: seen.append(done)}
    one = trainer(tmp_path / "none", hooks=loss)
    before = one.model.head.weight.clone()
    one.run()
    torch.testing.assert_close(one.model.head.weight, before, rtol=1e-3, atol=0)  # weight decay alone
    assert seen == [step / 18 for step in range(18)]
    one = trainer(tmp_path / "pulled")
    one.callback = callback(penalty=lambda done: 0.5 * one.model.head.weight.square().sum(), loss=loss["loss"])
    norm = one.model.head.weight.norm()
    one.run()
    assert one.model.head.weight.norm() < 0.5 * norm


class Counter:
    def __init__(self):
        self.count = 0

    def update(self, step, done):
        assert step == self.count
        self.count += 1

    def state_dict(self):
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state):
        self.count = int(state["count"])


def test_what_keeps_a_state_is_saved_and_resumed(tmp_path):
    def kill(model, done):
        if round(done * 18) == 10:
            raise Killed

    def counted():
        counter = Counter()
        return counter, {"after_step": counter.update, "stateful": {"counter": counter}}

    with pytest.raises(Killed):
        trainer(tmp_path, hooks={"before_step": kill, **counted()[1]}).run()
    counter, hooks = counted()
    trainer(tmp_path, hooks=hooks).run(resume=True)
    assert counter.count == 18


def test_figures_are_logged_with_the_loss(tmp_path):
    trainer(tmp_path, hooks={"figures": lambda: {"oscillating": 1.5}}).run()
    assert {record["oscillating"] for record in log(tmp_path) if "loss" in record} == {1.5}
