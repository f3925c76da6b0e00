"""What the teacher adds to the loss: the formulas, whose features are compared, and what stays untouched."""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven
from halfeven.errors import AlgorithmError, ConfigError
from halfeven.qat.distillation import Distillation, DistillationOptions, feature_loss, soft_label_loss
from halfeven.quantization.model_quantizers import set_mode
from halfeven.quantization.quantizer import Mode


class Block(nn.Module):
    """As torchvision writes them: the ReLU and the addition change their tensors in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Block())
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.drop(self.body(self.stem(x)).mean((2, 3))))


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the parameters of its output projection and never calls it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y)[0]).mean(1))


def images(seed=1):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 1, 2, 1])


@functools.cache
def pair(**options):
    """A float model with statistics of its own, and its quantized model in training mode."""
    torch.manual_seed(3)
    model = Net().train()
    for _ in range(3):
        model(images(2) * 2)
    qmodel = halfeven.prepare(model.eval(), images(), **options)
    return model, halfeven.calibrate(qmodel, [images()]).train()


def models(**options):
    return copy.deepcopy(pair(**options))


def options(**changes):
    return DistillationOptions(**changes)


def run(distillation, qmodel, x=None):
    """The distilled loss of one batch, with the student's outputs and its task loss."""
    x = images(5) if x is None else x
    outputs = qmodel(x)
    task = F.cross_entropy(outputs, LABELS)
    return distillation.loss(outputs, x, LABELS, task), outputs, task


def outputs_of(model, names, x):
    """What modules give on x, as it is when they give it."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(name, output.detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def relative(given, wanted):
    return float(((given - wanted) ** 2).mean() / (wanted**2).mean())


# The formulas


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels_are_compared_by_the_formula(temperature):
    student, teacher = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 4]])
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_label_loss(student, teacher, temperature), wanted)
    assert soft_label_loss(teacher, teacher, temperature) == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_soft_labels_is_that_of_cross_entropy_at_temperature_1():
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(soft_label_loss(student, teacher), student)
    (wanted,) = torch.autograd.grad(F.cross_entropy(student, teacher.detach().softmax(1)), student)
    torch.testing.assert_close(gradient, wanted)
    soft_label_loss(student, teacher).backward()
    assert teacher.grad is None


def test_a_features_error_is_relative_to_the_teachers_signal():
    wanted = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    given = torch.tensor([[1.0, -1.0], [2.0, 1.0]])
    assert float(feature_loss(given, wanted)) == pytest.approx(5 / 14)
    assert float(feature_loss(100 * given, 100 * wanted)) == pytest.approx(5 / 14)
    assert float(feature_loss(torch.zeros(2, 2), wanted)) == 1


def test_a_silent_teacher_teaches_nothing_and_spoils_nothing():
    given = torch.ones(3, requires_grad=True)
    loss = feature_loss(given, torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert given.grad.eq(0).all()


# The loss


def test_weight_0_is_the_task_loss_itself():
    model, qmodel = models()
    distillation = Distillation(model, qmodel, options())
    distillation.teacher.forward = None  # is not run
    loss, _, task = run(distillation, qmodel)
    assert loss is task


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_the_share_of_each(weight):
    model, qmodel = models()
    loss, outputs, task = run(Distillation(model, qmodel, options(weight=weight, temperature=2.0)), qmodel)
    p, q = (model(images(5)) / 2).softmax(1), (outputs / 2).softmax(1)
    torch.testing.assert_close(loss, (1 - weight) * task + weight * 4 * (p * (p / q).log()).sum(1).mean())


def test_at_weight_1_labels_are_ignored():
    model, qmodel = models()
    outputs = qmodel(images(5))
    distillation = Distillation(model, qmodel, options(weight=1.0))
    loss = distillation.loss(outputs, images(5), LABELS, torch.tensor(float("nan"), requires_grad=True))
    assert loss.isfinite()


def test_features_are_added_by_their_mean():
    model, qmodel = models()
    names = ("stem", "body.0.bn1")
    with Distillation(model, qmodel, options(weight=0.5, features=names, feature_weight=3.0)) as distillation:
        qmodel.eval()
        loss, outputs, task = run(distillation, qmodel)
    given, wanted = outputs_of(qmodel, names, images(5)), outputs_of(model, names, images(5))
    errors = [relative(g, w) for g, w in zip(given, wanted, strict=True)]
    assert min(errors) > 0
    soft = soft_label_loss(outputs, model(images(5)))
    torch.testing.assert_close(loss, 0.5 * task + 0.5 * soft + 3 * sum(errors) / 2)


def test_features_alone_add_their_error_to_the_loss():
    model, qmodel = models()
    with Distillation(model, qmodel.eval(), options(features=("head",))) as distillation:
        loss, outputs, task = run(distillation, qmodel)
    torch.testing.assert_close(loss, task + relative(outputs.detach(), model(images(5)).detach()))


@pytest.mark.parametrize("batchnorm", ["keep", "fold", "fold live"])
def test_without_quantization_teacher_and_student_agree(batchnorm):
    """So a feature means the same tensor in both: before what changes it in place, BatchNorm folded or not."""
    model, qmodel = models(batchnorm=batchnorm)
    set_mode(qmodel, Mode.FLOAT)
    names = ("body.0", "body.1.conv2" if batchnorm == "fold" else "body.1.bn1", "head")
    with Distillation(model, qmodel.eval(), options(features=names)) as distillation:
        loss, _, task = run(distillation, qmodel)
    assert (loss - task).item() == pytest.approx(0, abs=1e-6)
    with Distillation(model, qmodel, options(features=names)) as distillation:
        qmodel.stem.weight.data.mul_(2)
        loss, _, task = run(distillation, qmodel)
    assert (loss - task).item() > 0.1


def test_layers_that_the_float_model_never_calls():
    x = torch.randn(4, 6, 8)
    model = Attention().eval()
    qmodel = halfeven.calibrate(halfeven.prepare(model, x), [x])
    set_mode(qmodel, Mode.FLOAT)
    with Distillation(model, qmodel, options(features=("attention",))) as distillation:
        assert distillation.layers == {"attention": "attention.out_proj"}
        loss = distillation.loss(qmodel(x), x, LABELS, torch.zeros(()))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_best_teacher_may_be_another_model():
    _, qmodel = models()
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    loss, outputs, _ = run(Distillation(wide, qmodel, options(weight=1.0)), qmodel)
    torch.testing.assert_close(loss, soft_label_loss(outputs, wide(images(5))))


def test_inputs_by_keyword_or_position():
    class Difference(nn.Module):
        def forward(self, a, b):
            return a - b

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    distillation = Distillation(Difference(), nn.Linear(1, 1), options(weight=1.0))
    for inputs in ((a, b), {"b": b, "a": a}):
        assert float(distillation.loss(a - b, inputs, None, torch.zeros(()))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_teacher_runs_under_the_students_autocast(dtype):
    model, qmodel = models()
    x = images(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        outputs = qmodel(x)
        loss = Distillation(model, qmodel, options(weight=1.0)).loss(outputs, x, LABELS, outputs.sum())
        expected = model(x)
    assert expected.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_label_loss(outputs, expected), rtol=1e-6, atol=0)


def test_the_teacher_follows_the_student_to_its_device():
    student, teacher = nn.Linear(3, 5).to("meta"), nn.Linear(3, 5)
    x = torch.randn(4, 3, device="meta")
    with Distillation(teacher, student, options(weight=0.5)) as distillation:
        loss = distillation.loss(student(x), x, None, torch.zeros((), device="meta"))
    assert loss.device.type == distillation.teacher.weight.device.type == "meta"
    assert teacher.weight.device.type == "cpu"


# What learns, and what does not


def test_gradients_reach_the_student_alone():
    model, qmodel = models()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Distillation(model, qmodel, options(weight=1.0, features=("body.1",))) as distillation:
        loss, *_ = run(distillation, qmodel)
        loss.backward()
        teacher = distillation.teacher
    assert all(parameter.grad is not None for parameter in qmodel.parameters() if parameter.requires_grad)
    for one in (model, teacher):
        assert all(parameter.grad is None for parameter in one.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


def test_a_feature_teaches_the_layers_before_it():
    model, qmodel = models()
    with Distillation(model, qmodel, options(features=("body.0",))) as distillation:
        loss, _, task = run(distillation, qmodel)
        (loss - task).backward()
    learns = {name for name, p in qmodel.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-9}
    assert {"stem.weight", "body.0.conv2.weight", "body.0.bn2.weight"} <= learns
    assert not any(name.startswith(("body.1", "head")) for name in learns)


def test_the_model_given_is_left_alone_and_its_copy_is_in_eval():
    model, qmodel = models()
    model.train()
    with Distillation(model, qmodel, options(weight=1.0, features=("head",))) as distillation:
        teacher = distillation.teacher
        first, *_ = run(distillation, qmodel.eval())
        second, *_ = run(distillation, qmodel)
    assert torch.equal(first, second), "dropout is off and statistics stand still"
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.head.weight.zero_()
    assert teacher.head.weight.any(), "it is a copy"


def test_the_student_knows_nothing_of_its_teacher():
    model, qmodel = models()
    keys = list(qmodel.state_dict())
    parameters = list(map(id, qmodel.parameters()))
    holder = nn.Module()
    holder.qmodel = qmodel
    with Distillation(model, qmodel, options(weight=1.0, features=("body.1",))) as distillation:
        holder.distillation = distillation
        assert list(qmodel.state_dict()) == keys
        assert list(map(id, holder.parameters())) == parameters


# Names


def test_a_container_is_the_last_layer_called_in_it():
    model, qmodel = models()
    names = ("stem", "body.0", "body", "body.1.conv1")
    with Distillation(model, qmodel, options(features=names)) as distillation:
        found = distillation.layers
    assert found == dict(zip(names, ("stem", "body.0.bn2", "body.1.bn2", "body.1.conv1"), strict=True))


def test_a_container_of_folded_layers_is_its_last_convolution():
    model, qmodel = models(batchnorm="fold")
    with Distillation(model, qmodel, options(features=("body.0",))) as distillation:
        assert distillation.layers == {"body.0": "body.0.conv2"}


def test_a_region_in_a_model_that_stays_python():
    model = copy.deepcopy(pair()[0])
    qmodel = halfeven.prepare(model, images(), leave_out=("head",))
    names = ("body", "head", "stem")
    with Distillation(model, qmodel, options(features=names)) as distillation:
        assert distillation.layers == {"body": "body.1.bn2", "head": "head", "stem": "stem"}
        set_mode(qmodel, Mode.FLOAT)
        loss, _, task = run(distillation, qmodel.eval())
        assert (loss - task).item() == pytest.approx(0, abs=1e-6)
        qmodel.head.weight.data.mul_(2)
        loss, _, task = run(distillation, qmodel)
        assert (loss - task).item() > 0.01


def test_a_plain_module_may_be_the_student():
    model = copy.deepcopy(pair()[0])
    student = copy.deepcopy(model)
    student.body[1].bn2.weight.data.mul_(2)
    with Distillation(model, student, options(features=("body.1.bn2", "body.0"))) as distillation:
        loss, _, task = run(distillation, student)
    given, wanted = outputs_of(student, ["body.1.bn2"], images(5)), outputs_of(model, ["body.1.bn2"], images(5))
    torch.testing.assert_close(loss - task, torch.tensor(relative(given[0], wanted[0]) / 2))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("body.0.bn3", "body.0.bn[12]"),
        ("bodi.1", "body.1"),
        ("drop", "body|head|stem"),
        ("zzz", "There are stem, body"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=f'"{name}", and the student(.|\n)*({hint})'):
        Distillation(*models(), options(features=("stem", name)))


def test_a_layer_that_is_called_twice_gives_its_last_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 5)

        def forward(self, x):
            first, second = self.part
            return self.head(first(second(first(x)).relu()).relu())

    x = torch.randn(4, 4)
    model = Twice().eval()
    qmodel = halfeven.calibrate(halfeven.prepare(model, x), [x])
    with Distillation(model, qmodel, options(features=("part",))) as distillation:
        assert distillation.layers == {"part": "part.0"}
        loss = distillation.loss(qmodel(x), x, LABELS, torch.zeros(()))
    given, wanted = outputs_of(qmodel, ["part.0"], x), outputs_of(model, ["part.0"], x)
    assert loss.item() == pytest.approx(relative(given[0], wanted[0]), rel=1e-4)
    assert loss.item() > 0


def test_a_folded_batchnorm_has_no_feature():
    with pytest.raises(ConfigError, match="part of the layer before"):
        Distillation(*models(batchnorm="fold"), options(features=("body.0.bn2",)))


def test_a_layer_that_is_folded_live_has_another_scale():
    with pytest.raises(ConfigError, match=r"Name body\.0\.bn2 instead"):
        Distillation(*models(batchnorm="fold live"), options(features=("body.0.conv2",)))


def test_two_names_of_one_layer_count_once_or_not_at_all():
    with pytest.raises(ConfigError, match="one of them twice"):
        Distillation(*models(), options(features=("body", "body.1")))


def test_a_teacher_without_the_layer_is_refused():
    _, qmodel = models()
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ConfigError, match="the teacher calls no layer"):
        Distillation(other, qmodel, options(features=("stem",)))


def test_a_student_that_keeps_no_example_is_refused():
    model, qmodel = models()
    del qmodel.halfeven_example
    with pytest.raises(ConfigError, match="no example input"):
        Distillation(model, qmodel, options(features=("stem",)))


# Hooks


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_gone_after_close():
    model, qmodel = models()
    distillation = Distillation(model, qmodel, options(features=("stem", "body")))
    assert hooks_of(qmodel) == 2
    qmodel(images())
    distillation.close()
    assert hooks_of(qmodel) == hooks_of(distillation.teacher) == 0
    with pytest.raises(AlgorithmError, match="student gave nothing at stem"):
        run(distillation, qmodel)


def test_logits_alone_need_no_hooks():
    model, qmodel = models()
    Distillation(model, qmodel, options(weight=0.5))
    assert hooks_of(qmodel) == 0


def test_features_are_kept_for_one_loss_and_for_training_alone():
    model, qmodel = models()
    x = images(5)
    with Distillation(model, qmodel, options(features=("stem",))) as distillation:
        with torch.no_grad():
            outputs = qmodel(x)
        with pytest.raises(AlgorithmError, match="not run with gradients"):
            distillation.loss(outputs, x, LABELS, outputs.sum())
        run(distillation, qmodel)
        with pytest.raises(AlgorithmError, match="once after each forward pass"):
            distillation.loss(outputs, x, LABELS, outputs.sum())


def test_copies_of_the_student_have_no_hooks_at_work():
    model, qmodel = models()
    qmodel.eval()
    with Distillation(model, qmodel, options(features=("stem",))) as distillation:
        loss, _, task = run(distillation, qmodel)
        outputs = qmodel(images(5))
        twin = copy.deepcopy(qmodel)
        twin(images(7))  # must not take the place of what the student gave
        again = distillation.loss(outputs, images(5), LABELS, task)
    assert torch.equal(loss, again)
    assert all(hook.store is None for hook in twin.stem._forward_hooks.values()), "nothing is kept for it"


def test_a_file_of_the_student_holds_neither_features_nor_teacher():
    model = copy.deepcopy(pair()[0])
    student = copy.deepcopy(model)
    with Distillation(model, student, options(features=("stem",))):
        student(images(5))
        file = io.BytesIO()
        torch.save(student, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert torch.equal(read(images()), student(images()))
    assert all(hook.store is None for hook in read.stem._forward_hooks.values())


def test_the_student_is_exported_while_it_is_taught(tmp_path):
    model, qmodel = models()
    with Distillation(model, qmodel, options(features=("stem",))) as distillation:
        halfeven.export(qmodel.eval(), tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx").is_file()
        loss, *_ = run(distillation, qmodel)
    assert loss.isfinite()


def test_a_compiled_student_is_taught_the_same():
    model, qmodel = models()
    qmodel.eval()
    torch._dynamo.reset()
    with Distillation(model, qmodel, options(weight=0.5, features=("body.0", "stem"))) as distillation:
        wanted, *_ = run(distillation, qmodel)
        wanted.backward()
        gradients = [p.grad.clone() for p in qmodel.parameters() if p.grad is not None]
        qmodel.zero_grad()
        compiled = torch.compile(qmodel, backend="aot_eager")
        for x in (images(5), images(6), images(5)):
            loss, *_ = run(distillation, compiled, x)
        loss.backward()
    torch.testing.assert_close(loss, wanted)
    for given, expected in zip([p.grad for p in qmodel.parameters() if p.grad is not None], gradients, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)


# Mistakes


def test_other_classes_are_refused():
    _, qmodel = models()
    with pytest.raises(ConfigError, match=r"\(4, 5\) and the teacher's \(4, 7\)"):
        run(Distillation(Net(classes=7), qmodel, options(weight=1.0)), qmodel)


def test_other_widths_are_refused():
    student, teacher = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4))
    x = torch.randn(4, 2)
    with (
        Distillation(teacher, student, options(features=("0",))) as distillation,
        pytest.raises(ConfigError, match=r'feature "0" of the student have shape \(4, 3\)'),
    ):
        distillation.loss(student(x), x, None, torch.zeros(()))


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": -0.1},
        {"weight": 1.1},
        {"weight": float("nan")},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"feature_weight": 0.0},
        {"feature_weight": -1.0},
        {"features": ("a", "a")},
        {"features": ("",)},
    ],
)
def test_wrong_options_are_refused(changes):
    with pytest.raises(ConfigError, match=r"DistillationOptions\.|distillation\.features"):
        options(**changes)
