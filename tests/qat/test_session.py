"""What a recipe puts beside a training: losses, averages and frozen weights act, and a resumed run goes on the same."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import CheckpointError, ConfigError, HalfevenWarning
from halfeven.pipelines import setup_qat
from halfeven.ptq.options import PTQOptions
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.bit_schedule import ProgressionOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.options import QATOptions
from halfeven.quantization.model_quantizers import quantizers
from placement.parts import Residual

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (8, 8, 8), generator=torch.Generator().manual_seed(1))
OFF = {"start": "ranges", "distill": "off", "average": "off"}


def made(scheme="w4a4", model=None, loader=None, **options):
    torch.manual_seed(0)
    model = model or Residual()
    qmodel = he.calibrate(he.prepare(model, X, scheme=scheme, ranges="learned"), [X]).train()
    recipe = QATOptions(**OFF | options)
    return model, qmodel, setup_qat(qmodel, model, loader or [X], recipe, ptq=PTQOptions(iterations=20))


def train(qmodel, session, first, last, steps=8):
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05)
    for step in range(first, last):
        qmodel.train()
        session.before_step(qmodel, step / steps)
        outputs = qmodel(X)
        loss = session.loss(outputs, X, Y, F.cross_entropy(outputs, Y))
        if (penalty := session.penalty(step / steps)) is not None:
            loss = loss + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.after_step(step, (step + 1) / steps)


def test_with_nothing_chosen_the_loss_is_the_tasks():
    _, qmodel, session = made("w8a8")
    outputs = qmodel(X)
    task = F.cross_entropy(outputs, Y)
    assert session.loss(outputs, X, Y, task) is task
    assert session.penalty(0.9) is None
    assert session.other_models == {}


def test_channels_are_equalized_before_a_training_with_one_scale_per_weight():
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[:4] *= 100  # beside these the others vanish at 4 bits
        last.weight[:, :4] /= 100
    model = nn.Sequential(first, nn.ReLU6(), last).eval()
    said, errors = [], {}
    for equalize in ("off", "on"):
        options, ptq = QATOptions(**OFF, equalize=equalize), PTQOptions(relu6="replace")
        qmodel = he.prepare(model, X, scheme="w4a8", ranges="learned", batchnorm="fold", per_channel=False)
        session = setup_qat(he.calibrate(qmodel, [X]), model, [X], options, ptq=ptq, log=said.append)
        wanted = nn.Sequential(first, nn.ReLU() if equalize == "on" else nn.ReLU6(), last)(X)
        errors[equalize] = float(((qmodel.eval()(X) - wanted).std() / wanted.std()).detach())
        assert len(he.plan_of(qmodel).changes.unclipped) == (equalize == "on")
        train(qmodel, session, 0, 2)
    assert errors["on"] < 0.1 < 0.5 < errors["off"]
    assert [text for text in said if text.startswith("Equalization: 1 chains")]


@pytest.mark.parametrize(("feature", "scaled"), [("0", True), ("2", False)])
def test_features_whose_channels_equalization_scales_are_refused(feature, scaled):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    qmodel = he.calibrate(he.prepare(net, X, per_channel=False, batchnorm="fold"), [X])
    options = QATOptions(distill="on", distillation=DistillationOptions(features=(feature,)))
    with pytest.raises(ConfigError, match="scale the channels of 0, which") if scaled else contextlib.nullcontext():
        setup_qat(qmodel, net, [X], options)


def test_a_teacher_makes_the_loss():
    model, qmodel, session = made(distill="on")
    outputs = qmodel(X).flatten(2).mean(-1)
    session.distillation.teacher.forward = lambda x: model.eval()(x).flatten(2).mean(-1)
    found = session.loss(outputs, X, Y, outputs.sum())
    wanted = F.kl_div(
        outputs.log_softmax(1), model.eval()(X).flatten(2).mean(-1).log_softmax(1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)


def test_distillation_needs_the_float_model():
    _, qmodel, _ = made()
    with pytest.raises(ConfigError, match="no float model to learn from"):
        setup_qat(qmodel, None, [X], QATOptions(**OFF | {"distill": "on"}))


def test_the_average_is_another_form_and_lags_behind():
    _, qmodel, session = made(average="on")
    before = qmodel.stem.weight.detach().clone()
    train(qmodel, session, 0, 4)
    average = session.other_models["average"].stem.weight
    assert 0 < (average - before).norm() < (qmodel.stem.weight - before).norm()


def test_learned_rounding_is_where_training_starts():
    _, plain, _ = made()
    _, qmodel, session = made(start="blocks")
    assert session.recipe.reconstruct.enabled
    assert not torch.equal(qmodel.conv1.weight, plain.conv1.weight)
    assert all(p.requires_grad for p in qmodel.parameters())
    train(qmodel, session, 0, 2)
    assert all(q.state.fixed for q in quantizers(qmodel).values() if q.weight)


def test_batchnorm_is_re_estimated_before_validation():
    model, qmodel, _ = made()
    session = setup_qat(qmodel, model, [X], QATOptions(**OFF), ScheduleOptions(freeze_batchnorm_after=1.0))
    qmodel.norm.running_mean.fill_(100.0)
    session.before_validation(qmodel)
    assert bool((qmodel.norm.running_mean.abs() < 50).all())


def test_dampening_adds_to_the_loss_late_in_the_run():
    _, _, session = made(dampen_oscillations="on")
    assert session.penalty(0.1) == 0
    assert session.penalty(0.9) > 0


def test_shares_are_logged():
    _, qmodel, session = made(freeze_oscillations="on")
    train(qmodel, session, 0, 4)
    assert set(session.figures()) == {"oscillating", "frozen"}
    found = session.histograms()
    assert len(found["log2 of the scales of weights"]) > 1
    assert len(found["clipped share of activations, %"]) == len(found["log2 of the scales of activations"])


def test_an_iterator_of_batches_lasts_for_the_whole_training():
    _, qmodel, session = made("w4a8", loader=iter([X]), progress="on")
    train(qmodel, session, 0, 8)  # each stage calibrates
    session.before_validation(qmodel)
    assert session.bit_schedule.is_over
    assert all(quantizer.state.has_range for quantizer in quantizers(qmodel).values())


def test_a_model_with_more_bits_than_its_plan_is_not_saved(tmp_path):
    _, qmodel, session = made("w4a8", progress="on")
    he.save(qmodel, tmp_path / "start.safetensors")
    session.before_step(qmodel, 0.0)
    with pytest.raises(CheckpointError, match="the weight of stem has 8 bits at present, and 4 in the plan"):
        he.save(qmodel, tmp_path / "stage.safetensors")


def test_a_resumed_course_goes_on_the_same():
    options = {"average": "on", "freeze_oscillations": "on", "dampen_oscillations": "on"}
    _, whole, session = made(**options)
    train(whole, session, 0, 4)
    weights, states = copy.deepcopy(whole.state_dict()), copy.deepcopy(
        {name: one.state_dict() for name, one in session.stateful.items()}
    )  # fmt: skip
    train(whole, session, 4, 8)
    _, resumed, other = made(**options)
    resumed.load_state_dict(weights)
    for name, one in other.stateful.items():
        one.load_state_dict(states[name])
    train(resumed, other, 4, 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for name, value in session.average.model.state_dict().items():
        assert torch.equal(other.average.model.state_dict()[name], value), name


def test_weights_of_other_bits_than_the_plans_are_not_averaged():
    options = {"average": "on", "progress": "on", "progression": ProgressionOptions(bits=(8,), share=0.5)}
    _, qmodel, session = made(**options)
    train(qmodel, session, 0, 4)  # the last of these steps ends at half of the run
    assert not session.average.state_dict()["started"]
    train(qmodel, session, 4, 5)
    assert session.average.state_dict()["started"]


def test_a_step_that_clips_much_is_told_with_names_once_after_each_validation():
    _, qmodel, session = made("w8a8")
    with torch.no_grad():
        qmodel.get_submodule("quantizers.relu").scale.mul_(1e-3)
    with pytest.warns(HalfevenWarning, match=r"1 of 4 quantized activations clip more than 20%.*relu \("):
        train(qmodel, session, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfevenWarning)
        train(qmodel, session, 1, 2)
    with torch.no_grad():
        qmodel.get_submodule("quantizers.relu_1").scale.mul_(1e-3)
    session.before_validation(qmodel)
    with pytest.warns(HalfevenWarning, match=r"relu_1 \("):
        train(qmodel, session, 2, 3)
