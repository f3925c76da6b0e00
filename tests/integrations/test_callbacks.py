"""Each trainer's callback calls the session's hooks at the right steps, and refuses what it would leave out."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import CheckpointError, ConfigError, HalfevenWarning
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat
from halfeven.qat.options import QATOptions
from halfeven.quantization.model_quantizers import quantizers
from placement.parts import IMAGE, Residual

pytestmark = pytest.mark.usefixtures("unfused")
X = torch.randn(IMAGE)


def steps(kind=SessionSteps, **options):
    torch.manual_seed(0)
    model = Residual().eval()
    qmodel = he.calibrate(he.prepare(model, X, scheme="w4a8"), [X])
    return kind(setup_qat(qmodel, model, [X], QATOptions(**options)), qmodel.train())


class Recorded(SessionSteps):
    """Writes down what was called."""

    def __init__(self, session, qmodel):
        super().__init__(session, qmodel)
        self.calls = []
        session.before_step = lambda model, done: self.calls.append(("before", done))
        session.after_step = lambda step, done: self.calls.append(("after", step, done))
        session.before_validation = lambda model: self.calls.append(("validation", model is qmodel))


EXPECTED = [
    ("before", 0.0), ("after", 0, 0.5), ("before", 0.5), ("after", 1, 1.0), ("validation", True), ("validation", False),
]  # fmt: skip


def test_in_a_loop():
    one = steps(Recorded)
    one.start(2)
    for _ in range(2):
        one.before_step()
        one.after_step()
    one.after_step(2)  # a batch of an accumulation that ends no step
    one.before_validation()
    assert one.calls == EXPECTED


def test_the_callback_takes_the_sessions_steps_in_transformers():
    pytest.importorskip("transformers", reason='needs the extra "text"')
    from halfeven.integrations.transformers import QATCallback

    one = steps(type("Both", (Recorded, QATCallback), {"__init__": Recorded.__init__}))
    state, control = SimpleNamespace(max_steps=2, global_step=0), SimpleNamespace(should_evaluate=False)
    one.on_train_begin(None, state, control)
    for step in range(2):
        one.on_step_begin(None, state, control)
        state.global_step = step + 1
        one.on_step_end(None, state, control)
    control.should_evaluate = True
    one.on_epoch_end(None, state, control)
    assert one.calls == EXPECTED


class Net(torch.nn.Module):
    """Returns its loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)

    def forward(self, x, labels):
        outputs = self.last(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}


class Seen(torch.nn.Module):
    """The model of a Trainer, which writes down in which forward passes BatchNorm followed the batch."""

    def __init__(self, qmodel):
        super().__init__()
        self.qmodel, self.followed = qmodel, []

    def forward(self, x, labels):
        before = self.qmodel.norm.running_mean.clone()
        outputs = self.qmodel(x=x, labels=labels)
        if self.training:
            self.followed.append(not torch.equal(before, self.qmodel.norm.running_mean))
        return outputs


def test_batchnorm_stays_frozen_in_every_micro_batch_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason='needs the extra "text"')
    from halfeven.integrations.transformers import QATCallback

    data = [{"x": torch.randn(3, 8, 8), "labels": torch.tensor(i % 2)} for i in range(12)]
    batch = torch.utils.data.default_collate(data)
    model = Net().eval()
    qmodel = he.calibrate(he.prepare(model, batch), [batch])
    callback, seen = QATCallback(setup_qat(qmodel, model, [batch]), qmodel), Seen(qmodel)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        eval_strategy="steps", eval_steps=2, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    transformers.Trainer(seen, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]).train()
    assert seen.followed == [True] * 4 + [False] * 2  # two thirds of the steps, of two batches each
    assert not qmodel._forward_pre_hooks


def test_a_run_without_a_known_length_is_refused():
    one = steps(dampen_oscillations="on")
    outputs = one.qmodel(X)
    for call in (one.before_step, lambda: one.loss(outputs, X, None, outputs.mean()), one.after_step):
        with pytest.raises(ConfigError, match=r"steps.start\(total\)"):
            call()


def test_lightnings_trainer_without_an_end_is_refused():
    pytest.importorskip("lightning", reason='needs the extra "lightning"')
    from halfeven.integrations.lightning import QATCallback

    with pytest.raises(ConfigError, match="max_steps"):
        steps(QATCallback).on_train_start(SimpleNamespace(estimated_stepping_batches=float("inf"), global_step=0), None)


def test_the_callback_takes_the_sessions_steps_in_lightning():
    pytest.importorskip("lightning", reason='needs the extra "lightning"')
    from halfeven.integrations.lightning import QATCallback

    one = steps(type("Both", (Recorded, QATCallback), {"__init__": Recorded.__init__}))
    trainer = SimpleNamespace(estimated_stepping_batches=2, global_step=0, sanity_checking=True)
    one.on_validation_start(trainer, None)
    trainer.sanity_checking = False
    one.qmodel.eval()  # Lightning does not change it
    one.on_fit_start(trainer, None)
    one.on_train_start(trainer, None)
    assert one.qmodel.training
    for step in range(2):
        one.on_train_batch_start(trainer, None, None, step)
        trainer.global_step = step + 1
        one.on_train_batch_end(trainer, None, None, None, step)
    one.on_validation_start(trainer, None)
    assert one.calls == EXPECTED


def test_learned_scales_follow_the_learning_rate_and_do_not_decay():
    one = steps()
    scales = {id(quantizer.scale) for quantizer in quantizers(one.qmodel).values() if quantizer.learned}
    for kind, share in (("sgd", 0.1), ("adamw", 1.0)):
        groups = one.parameter_groups(0.5, optimizer=kind, weight_decay=0.25)
        found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert scales
        assert {found[scale] for scale in scales} == {(0.5 * share, 0.0)}
        assert found[id(one.qmodel.get_parameter("conv1.weight"))] == (0.5, 0.25)


def test_the_decay_that_an_optimizer_is_given_is_that_of_the_weights():
    one = steps()
    optimizer = torch.optim.SGD(one.parameter_groups(0.5), weight_decay=0.25)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(one.qmodel.get_parameter("conv1.weight"))] == 0.25
    assert decays[id(one.qmodel.get_parameter("norm.weight"))] == 0
    assert all(decays[id(q.scale)] == 0 for q in quantizers(one.qmodel).values() if q.learned)


def test_a_recipe_that_changes_the_loss_needs_the_call():
    one = steps(distill="on")
    one.start(2)
    one.before_step()
    with pytest.raises(ConfigError, match="without callback"):
        one.after_step(1)
    outputs = one.qmodel(X)
    task_loss = outputs.square().mean()
    assert not torch.equal(one.loss(outputs, X, None, task_loss), task_loss)
    one.after_step(1)


def test_its_state_goes_on_in_another_process():
    one, other = steps(), steps()
    one.start(4)
    one.before_step()
    with torch.no_grad():
        next(one.qmodel.parameters()).add_(1)
    one.after_step(1)
    other.start(4, step=1)
    other.load_state_dict(one.state_dict())
    average, again = (each.session.other_models["average"].state_dict() for each in (one, other))
    assert all(torch.equal(average[name], again[name]) for name in average)


def test_the_state_of_another_recipe_is_refused():
    one, other = steps(), steps(average="off")
    with pytest.raises(CheckpointError, match="The state has nothing, and this recipe keeps average"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="The state has average, and this recipe keeps nothing"):
        other.load_state_dict(one.state_dict())


def test_a_step_in_eval_mode_is_a_warning():
    one = steps()
    one.start(3)
    one.qmodel.eval()
    with pytest.warns(HalfevenWarning, match=r"eval mode in a training step.*qmodel.train\(\)"):
        one.before_step()
    one.after_step()
    one.before_step()  # warned once, and warnings would be errors


def test_a_call_that_the_loop_forgets_is_a_warning():
    one, other = steps(), steps()
    one.start(2)
    one.before_step()
    with pytest.warns(HalfevenWarning, match=r"No optimizer step was counted.*steps\.after_step\(\)"):
        one.before_validation()
    other.start(2)
    with pytest.warns(HalfevenWarning, match=r"without steps\.before_step\(\)"):
        other.after_step()


def test_more_steps_than_were_told_are_a_warning():
    """As of a loop over epochs that gives the steps of one."""
    one = steps(dampen_oscillations="on")
    one.start(1)
    one.qmodel.train()
    one.before_step()
    one.loss(one.qmodel(X), X, None, torch.zeros(()))
    one.after_step()
    with pytest.warns(HalfevenWarning, match="the steps of the whole run|of all epochs"):
        one.before_step()
    one.loss(one.qmodel(X), X, None, torch.zeros(()))
    one.after_step()


def test_a_trainer_of_another_model_is_refused():
    one = steps()
    one.check_trained(torch.nn.Sequential(one.qmodel))
    with pytest.raises(ConfigError, match="The Sequential that is trained does not contain the quantized model"):
        one.check_trained(torch.nn.Sequential(copy.deepcopy(one.qmodel)))


def test_arguments_in_the_wrong_order_are_named():
    one = steps()
    with pytest.raises(ConfigError, match=r"cannot use session: it is a \w+, and must be QATSession"):
        SessionSteps(one.qmodel, one.session)


def test_a_score_that_is_none_is_refused():
    one = steps()
    for score in (None, float("nan"), {"top1": 3.0}):
        with pytest.raises(ConfigError, match="which is no metric"):
            one.best(lambda model, score=score: score)


def test_the_better_of_weights_and_average_is_chosen():
    one = steps()
    one.start(2)
    one.before_step()
    one.after_step(1)
    average = one.session.other_models["average"]
    assert one.best(lambda model: float(model is average)) is average
    assert one.best(lambda model: float(model is one.qmodel)) is one.qmodel
    assert "average of the weights" in one.report()


def test_the_average_is_where_the_model_is():
    """Lightning moves the model back to the CPU when it has ended."""
    one = steps()
    one.qmodel.to("meta")
    assert {next(model.parameters()).device.type for model in one.models().values()} == {"meta"}
