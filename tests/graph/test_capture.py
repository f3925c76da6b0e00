"""Capture: the captured model is the model, whatever the model does."""

import copy
import dataclasses
import inspect
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import halfeven as he
from halfeven.errors import CaptureError
from halfeven.graph.capture import capture
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import kind_of
from sweeps import sweep

timm = pytest.importorskip("timm")


class Net(nn.Module):
    """BatchNorm, dropout, a residual addition, reused layers and in-place operators."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, momentum=0.3, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("offset", torch.ones(1), persistent=False)
        self.register_buffer("gain", torch.full((1,), 2.0))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.relu(self.conv(x))
        y = self.norm(self.conv(y))  # the convolution and the ReLU are used twice
        x = self.relu(y + x)
        x = self.drop(x).mean((2, 3)) * self.gain
        x += self.offset
        return self.fc(x)


class Residual(nn.Module):
    """Stochastic depth, as torchvision and timm have it."""

    def __init__(self, drop_path):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.drop_path = drop_path

    def forward(self, x):
        return x + self.drop_path(self.conv(x))


def image(batch=3, size=8):
    return torch.randn(batch, 3, size, size)


def settle(model):
    """Statistics and affine parameters as a trained model has them, not ones and zeros."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    return model


def outputs(model, args, kwargs):
    return pytree.tree_leaves(model(*args, **kwargs))


def assert_same(model, captured, args=(), kwargs=None, batches=2):
    """Bit for bit: outputs in eval and in training mode, gradients, and the state that training leaves."""
    kwargs = kwargs or {}
    model, captured = copy.deepcopy(model), copy.deepcopy(captured)
    with torch.no_grad():
        for mine, its in zip(outputs(model.eval(), args, kwargs), outputs(captured.eval(), args, kwargs), strict=True):
            assert torch.equal(mine, its)
    for _ in range(batches):
        results = []
        for module in (model.train(), captured.train()):
            torch.manual_seed(5)
            found = [y for y in outputs(module, args, kwargs) if isinstance(y, torch.Tensor)]
            sum((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in found).backward()
            results.append(found)
        for mine, its in zip(*results, strict=True):
            assert torch.equal(mine, its)
    gradients = dict(captured.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name].grad, parameter.grad), name
    state = captured.state_dict()
    assert set(state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def whole(model, example, **options):
    captured, report = capture(model, example, **options)
    assert report.regions == [""], report.left
    assert isinstance(captured, CapturedModule)
    return captured


def test_equals_the_original_bit_for_bit():
    model = settle(Net())
    captured = whole(model, image())
    assert_same(model, captured, (image(),))
    assert_same(model, captured, (image(7, 8),))


def test_training_mode_draws_dropout_and_updates_statistics():
    """The two things that an exported ATen graph has lost."""
    captured = whole(settle(Net()), image())
    x = image()
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    captured.train()
    assert not torch.equal(captured(x), captured(x))
    moved = {name for name, value in captured.state_dict().items() if not torch.equal(value, before[name])}
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "stem.1.running_mean"} <= moved
    captured.eval()
    assert torch.equal(captured(x), captured(x))
    assert captured.norm.momentum == 0.3
    assert captured.norm.eps == 1e-3


def test_shares_the_models_parameters_and_leaves_its_mode():
    model = settle(Net()).train()
    model.norm.eval()
    captured = whole(model, image())
    assert model.training
    assert not model.norm.training
    mine, its = dict(model.named_parameters()), dict(captured.named_parameters())
    assert mine.keys() == its.keys()
    assert all(its[name] is parameter for name, parameter in mine.items())


def test_keeps_names_types_and_persistence():
    model = Net()
    captured = whole(model, image())
    assert set(captured.state_dict()) == set(model.state_dict())
    assert "offset" in dict(captured.named_buffers())
    assert "offset" not in captured.state_dict()
    for name in ("stem.0", "stem.1", "conv", "norm", "drop", "fc"):
        assert type(captured.get_submodule(name)) is type(model.get_submodule(name))
    captured.load_state_dict(model.state_dict())


def test_a_reused_layer_is_one_module_called_twice():
    captured = whole(Net(), image())
    calls = [node.target for node in captured.graph.nodes if node.op == "call_module"]
    assert calls.count("conv") == 2


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size_from_an_example_of_one(batch):
    model = settle(Net()).eval()
    captured = whole(model, image(1))
    x = image(batch)
    assert torch.equal(captured(x), model(x))


def test_a_copy_is_independent():
    model = settle(Net())
    captured = whole(model, image())
    other = copy.deepcopy(captured)
    with torch.no_grad():
        other.fc.weight.zero_()
        other.offset.zero_()
    assert captured.fc.weight.abs().sum() > 0
    assert captured.offset.item() == 1
    assert other.conv is not captured.conv
    assert_same(model, captured, (image(),))
    assert "offset" not in other.state_dict()


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.unused = nn.Linear(4, 4)
        self.tied = nn.Linear(3, 2)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        return self.fc(x) + self.tied(x)


def test_unused_and_tied_parameters_stay():
    model = Extra()
    captured = whole(model, torch.randn(2, 3))
    assert set(captured.state_dict()) == set(model.state_dict())
    assert captured.fc.weight is captured.tied.weight
    other = copy.deepcopy(captured)
    assert other.fc.weight is other.tied.weight
    assert set(other.state_dict()) == set(model.state_dict())
    assert_same(model, captured, (torch.randn(4, 3),))


def drop_paths():
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    return [DropPath(0.5), StochasticDepth(0.5, "row")]


@pytest.mark.parametrize("drop_path", drop_paths(), ids=lambda module: type(module).__name__)
def test_stochastic_depth_comes_back(drop_path):
    model = Residual(drop_path)
    captured = whole(model, image())
    assert_same(model, captured, (image(8),))
    captured.train()
    x = image(8)
    assert not torch.equal(captured(x), captured(x))
    assert "drop_path" in dict(captured.named_modules())


class ChangedResult(Residual):
    """A block as torchvision's EfficientNet has it: the skip connection is added in place."""

    def forward(self, x):
        result = self.drop_path(self.conv(x))
        result += x
        return result


LAST = [*drop_paths(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Identity()]


@pytest.mark.parametrize("last", LAST, ids=lambda module: type(module).__name__)
def test_changes_in_place_of_what_a_module_returned(last):
    model = settle(ChangedResult(last))
    captured = whole(model, image())
    assert_same(model, captured, (image(8),))


def test_sync_batchnorm_conversion():
    model = settle(Net())
    captured = whole(model, image()).eval()
    x = image()
    expected = captured(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(captured)
    assert [type(m).__name__ for m in converted.modules()].count("SyncBatchNorm") == 2
    assert torch.equal(converted.eval()(x), expected)
    again = whole(converted, image())
    assert torch.equal(again(x), expected)


def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = settle(Net())
        captured = whole(copy.deepcopy(model), image())
        wrapped = DistributedDataParallel(captured)
        x = image()
        torch.manual_seed(1)
        wrapped.train()(x).sum().backward()
        torch.manual_seed(1)
        model.train()(x).sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(captured.get_parameter(name).grad, parameter.grad)
    finally:
        dist.destroy_process_group()


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


pytree.register_dataclass(Output)


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.head, self.kind = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), kind

    def forward(self, x, *, scale=None, flag=True):
        features = self.conv(x)
        if scale is not None:
            features = features * scale.reshape(-1, 1, 1, 1)
        logits = self.head(features.mean((2, 3)))
        return {
            "dict": lambda: {"logits": logits, "more": [features, (logits,)]},
            "tuple": lambda: (logits, features),
            "dataclass": lambda: Output(logits, features),
        }[self.kind]()


@pytest.mark.parametrize("kind", ["dict", "tuple", "dataclass"])
def test_structured_outputs_keep_their_structure(kind):
    model = Heads(kind)
    captured = whole(model, image())
    assert type(captured(image())) is type(model(image()))
    assert_same(model, captured, (image(5),))
    if kind == "dataclass":
        found = captured.eval()(image())
        assert [f.name for f in dataclasses.fields(found)] == ["logits", "features"]
        assert found.logits.shape == (3, 2)


def test_a_model_takes_keyword_inputs():
    model = Heads("dict")
    captured = whole(model, {"x": image(), "scale": torch.rand(3)})
    assert_same(model, captured, kwargs={"x": image(5), "scale": torch.rand(5)})


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x, y):
        return self.a(x) * self.b(y)


def test_a_model_takes_positional_inputs():
    model = TwoInputs()
    captured = whole(model, (torch.randn(2, 3), torch.randn(2, 5)))
    assert_same(model, captured, (torch.randn(6, 3), torch.randn(6, 5)))


class InPlace(nn.Module):
    """Every in-place form that float models use."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x):
        x = self.conv1(x)
        y = self.conv2(F.relu(x, inplace=True))
        y += x
        y.mul_(0.5).add_(1)
        y = F.leaky_relu_(self.act(y), 0.1)
        return (y * 2).clamp_(0, 6).sigmoid_()


def test_in_place_operators_become_functional():
    model = InPlace()
    captured = whole(model, image())
    x = image()
    kept = x.clone()
    captured.eval()(x)
    assert torch.equal(x, kept)
    assert_same(model, captured, (image(),))
    mutable = [
        node.target
        for node in captured.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    assert mutable == []


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=(1, 0, 1), dilation=(1, 2, 1)), (2, 2, 5, 7, 5)),
    "same padding": (lambda: nn.Conv2d(3, 3, 3, padding="same"), (2, 3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, bias=False), (2, 4, 5)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch norm 1d of sequences": (lambda: nn.BatchNorm1d(4), (5, 4, 7)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (5, 4, 3, 3, 3)),
    "batch norm without affine": (lambda: nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
    "batch norm, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (5, 4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (3, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 5)),
    "linear 3d": (lambda: nn.Linear(5, 6, bias=False), (3, 4, 5)),
    "dropout 2d": (lambda: nn.Dropout2d(0.4), (6, 4, 5, 5)),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_every_layer_comes_back_as_itself(name):
    build, shape = LAYERS[name]
    model = nn.Sequential()
    model.add_module("first", nn.Identity())
    model.add_module("layer", settle(nn.Sequential(build()))[0])
    model.add_module("last", nn.PReLU())
    captured = whole(model, torch.randn(shape))
    assert type(captured.layer) is type(model.layer)
    assert_same(model, captured, (torch.randn(shape),))


def test_attention_shows_its_layers():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    captured = whole(model, torch.randn(2, 5, 16))
    linear = [node for node in captured.graph.nodes if kind_of(node) is OperatorKind.LINEAR]
    assert len(linear) >= 4
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(captured.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)


# What cannot be captured


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Branching(nn.Module):
    """Python decides on the data, in the middle of the model."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Block(), Block())
        self.left, self.right = Block(), Block()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = self.body(x)
        x = self.left(x) if x.sum() > 0 else self.right(x)  # the branch
        return self.fc(x.mean((2, 3)))


def test_a_branch_on_data_leaves_the_largest_submodules(capsys):
    model = settle(Branching())
    captured, report = capture(model, image())
    assert "def forward" not in capsys.readouterr().err  # torch.export prints what it has of a graph
    assert "body" in report.regions
    assert "fc" in report.regions
    assert "left" in report.regions  # the example went there
    assert not any(name.startswith("body.") for name in report.regions)
    (left,) = [left for left in report.left if left.name == ""]
    line = next(
        number
        for number, text in enumerate(inspect.getsource(Branching).splitlines(), inspect.getsourcelines(Branching)[1])
        if "# the branch" in text
    )
    assert f"test_capture.py:{line}" in left.reason
    assert "x.sum() > 0" in left.reason
    assert_same(model, captured, (image(),))
    assert {name for name, m in captured.named_modules() if isinstance(m, CapturedModule)} == set(report.regions)


def test_a_submodule_that_the_example_did_not_reach_stays_and_is_reported():
    model = settle(Branching())
    _, report = capture(model, image())
    assert "right" not in report.regions
    assert any(left.name.startswith("right") for left in report.left)


def test_parameters_of_a_partly_captured_model_are_the_models_own():
    model = settle(Branching())
    captured, _ = capture(model, image())
    mine, its = dict(model.named_parameters()), dict(captured.named_parameters())
    assert mine.keys() == its.keys()
    assert all(its[name] is parameter for name, parameter in mine.items())


def test_a_submodule_that_is_left_out_stays_python():
    model = settle(Net())
    captured, report = capture(model, image(), leave_out=["fc"])
    assert type(captured) is Net
    assert "fc" not in report.regions
    assert any(left.name == "fc" and "request" in left.reason for left in report.left)
    assert_same(model, captured, (image(),))


def test_a_normalization_that_is_a_region_of_its_own_stays_python_and_trains():
    """As a function in a graph it would compute as in eval mode for ever."""
    model = settle(Net())
    captured, report = capture(model, image(), leave_out=["fc"])
    assert type(captured.norm) is nn.BatchNorm2d
    assert "conv" in report.regions
    (left,) = [left for left in report.left if left.name == "norm"]
    assert "train() could not update" in left.reason
    assert "restoration.py" not in left.reason


def test_leave_out_of_a_name_that_does_not_exist():
    with pytest.raises(CaptureError, match=r"leave_out names body\.9.*no such submodule"):
        capture(Net(), image(), leave_out=["body.9"])


def test_an_example_the_model_does_not_take():
    with pytest.raises(CaptureError, match="does not run on the example input"):
        capture(Net(), torch.randn(2, 5, 8, 8))
    with pytest.raises(CaptureError, match="does not run on the example input"):
        capture(Net(), {"picture": image()})


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x * self.weight if x.sum().item() > 1e9 else x + self.weight


def test_nothing_captured_names_what_was_tried():
    model = nn.Sequential(Opaque(), Opaque())
    with pytest.raises(CaptureError, match=r"No part of the model could be captured") as caught:
        capture(model, torch.randn(2, 3))
    assert "x.sum().item() > 1e9" in str(caught.value)
    assert "leave_out" in str(caught.value)


def test_the_modes_come_back_after_a_failure():
    model = nn.Sequential(Opaque()).train()
    with pytest.raises(CaptureError):
        capture(model, torch.randn(2, 3))
    assert model.training
    assert model[0].training


TIMM = {
    "resnet10t": 64,
    "mobilenetv3_small_050": 32,
    "regnetx_002": 32,
    "convnext_atto": 32,
    "vit_tiny_patch16_224": 32,
}


@pytest.mark.parametrize("name", sweep(sorted(TIMM), "resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"))
def test_models_of_timm_are_captured_whole(name):
    size = TIMM[name]
    options = {"img_size": size} if name.startswith("vit") else {}
    model = settle(timm.create_model(name, num_classes=7, **options))
    captured = whole(model, image(2, size))
    assert set(captured.state_dict()) == set(model.state_dict())
    x = image(2, size)
    with torch.no_grad():
        assert torch.equal(captured.eval()(x), model.eval()(x))
        torch.manual_seed(3)
        mine = model.train()(x)
        torch.manual_seed(3)
        its = captured.train()(x)
    assert torch.equal(mine, its)
    # One module for each layer that has parameters: none is left as a bare function.
    types = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    layers = {n for n, m in model.named_modules() if isinstance(m, types)}
    assert {n for n, m in captured.named_modules() if isinstance(m, types)} == layers


class PartsChanged(nn.Module):
    """Changes parts of tensors in place, through slices and selections of them, one within the other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        y = self.fc(x).reshape(-1, 2, 3)
        y[:, 1:, :2] += 1.0
        y[:, 0] = y[:, 1] * 2
        y[:, :, :] = y.relu()
        part = y[:, 0]
        part.mul_(3)
        return y.flatten(1), y[:, :, 2]


def test_parts_of_tensors_changed_in_place():
    model, x = PartsChanged().eval(), torch.randn(4, 6)
    captured, report = capture(model, x)
    assert report.regions == [""]
    for found, expected in zip(captured(x), model(x), strict=True):
        assert torch.equal(found, expected)
    assert not any(node.target._schema.is_mutable for node in captured.graph.nodes if hasattr(node.target, "_schema"))


class Overwritten(nn.Module):
    """Puts other values into a part of a tensor, the same for all rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x) * 2
        y[:, 1:] = x[:, :1] + y[:, :1]
        return y


def test_an_overwritten_part_has_gradients():
    model, x = Overwritten().eval(), torch.randn(3, 4)
    captured, _ = capture(model, x)
    assert torch.equal(captured(x), model(x))
    gradients = []
    for one in (model, captured):
        one.zero_grad()
        one(x).square().sum().backward()
        gradients.append(one.linear.weight.grad.clone())
    assert torch.allclose(*gradients)
    x = torch.randn(5, 4)
    assert torch.equal(captured(x), model(x))


@dataclasses.dataclass
class Scene:
    image: torch.Tensor
    weight: torch.Tensor


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    more: "Named | None" = None


class Named(dict):
    """Names by attribute, as in many libraries."""


class OwnClasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, scene):
        y = self.layer(scene.image) * scene.weight
        return Answer(y, Named(doubled=2 * y))


def test_classes_of_the_users_own():
    scene = Scene(torch.randn(4, 8), torch.rand(4, 1))
    qmodel = he.prepare(OwnClasses(), (scene,))
    assert he.plan_of(qmodel).notes == ()
    for batch in (scene, (scene,), (scene, torch.zeros(4))):
        he.calibrate(qmodel, [batch])
    found = qmodel(Scene(torch.randn(3, 8), torch.rand(3, 1)))
    assert type(found) is Answer
    assert type(found.more) is Named
    assert list(found.more) == ["doubled"]
