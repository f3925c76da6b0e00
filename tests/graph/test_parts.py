"""A captured model is an ordinary module: containers, attributes and methods; what cannot work says why."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import CaptureError, ExportError


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Blocks(nn.Module):
    """A container of a user's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([block(3, 4), block(4, 4)])

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]

    def forward(self, x):
        for part in self.inner:
            x = part(x)
        return x


class Mixin:
    @property
    def dtype(self):
        return next(self.parameters()).dtype


class Net(nn.Module, Mixin):
    names = ("cat", "dog")

    def __init__(self):
        super().__init__()
        self.blocks = Blocks()
        self.heads = nn.ModuleDict({"label": nn.Linear(4, 2), "box": nn.Linear(4, 3)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))])
        self.num_classes = 2
        self.config = {"width": 4}
        self.function = lambda x: x
        self.listed = [self.blocks]

    @property
    def width(self):
        return self.config["width"]

    @staticmethod
    def version():
        return 3

    def freeze_backbone(self):
        return len([p.requires_grad_(False) for p in self.blocks.parameters()])

    def loss(self, x, y):
        return F.cross_entropy(self(x)["label"], y)

    def features(self, x):
        return self.blocks(x)

    def forward(self, x):
        x = self.blocks(x).mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return {name: head(x) * scale for (name, head), scale in zip(self.heads.items(), self.scales, strict=True)}


X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def pair():
    model = Net().eval()
    return model, he.calibrate(he.prepare(model, X), [X])


def copies(qmodel):
    return {"itself": qmodel, "a copy": copy.deepcopy(qmodel), "a pickle": pickle.loads(pickle.dumps(qmodel))}


@pytest.mark.parametrize("which", ["itself", "a copy", "a pickle"])
def test_containers_and_attributes_are_the_float_models(pair, which):
    model, qmodel = pair
    found = copies(qmodel)[which]
    assert isinstance(found.blocks.inner[0][0], nn.Conv2d)
    assert len(found.blocks.inner) == 2
    assert [type(child).__name__ for child in found.blocks.inner[1]][:2] == ["QuantizedConv2d", "BatchNorm2d"]
    assert [len(part) for part in found.blocks.inner] == [3, 3]
    assert found.blocks.inner[-1] is found.blocks.inner[1]
    assert len(list(found.blocks.inner[0][:2].parameters())) == len(list(found.blocks.inner[0].parameters()))
    assert list(found.heads) == list(found.heads.keys()) == ["label", "box"]
    assert found.heads["box"] is dict(found.heads.items())["box"]
    assert "box" in found.heads
    assert (found.num_classes, found.config) == (2, {"width": 4})
    assert list(dict(found.named_parameters()))[:1] == ["blocks.inner.0.0.weight"]
    names = [name for name, _ in found.named_parameters() if "quantizer" not in name]
    assert names == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        assert torch.equal(found(X)["label"], qmodel(X)["label"])


@pytest.mark.parametrize("which", ["itself", "a copy"])
def test_methods_and_properties_are_the_float_models(pair, which):
    model, qmodel = pair
    found = copy.deepcopy(copies(qmodel)[which])
    assert (found.width, found.names, found.version(), len(found.blocks)) == (4, ("cat", "dog"), 3, 2)
    assert found.blocks[1] is found.blocks.inner[1]
    assert found.dtype == torch.float32
    assert found.loss(X, torch.tensor([0, 1])).ndim == 0
    assert len(found.scales) == 2
    assert found.scales[1] is found.get_parameter("scales.1")
    assert found.freeze_backbone() == model.freeze_backbone() + 2 * (found.blocks[0][0].weight_quantizer.learned)
    assert not found.blocks[0][0].weight.requires_grad
    assert model.loss(X, torch.tensor([0, 1])).ndim == 0


def test_slices_name_their_children_as_torch_does(pair):
    model, qmodel = pair
    layers = OrderedDict(stem=nn.Conv2d(3, 4, 1), act=nn.ReLU(), head=nn.Conv2d(4, 2, 1))
    named = nn.Sequential(layers).eval()
    captured = he.prepare(named, X)
    for chosen in (slice(1, None), slice(None, None, 2), slice(None, 1)):
        assert list(captured[chosen]._modules) == list(named[chosen]._modules)
        assert list(qmodel.blocks.inner[chosen]._modules) == list(model.blocks.inner[chosen]._modules)
    assert captured[1:].head is captured.head
    assert list(captured[1:][1:]._modules) == ["head"]


def test_the_whole_model_may_be_a_container():
    model = nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1)).eval()
    qmodel = he.prepare(model, X, batchnorm="fold")
    assert len(qmodel) == 2
    assert [type(child).__name__ for child in qmodel] == ["Part", "QuantizedConv2d"]
    assert qmodel[-1] is qmodel.get_submodule("1")
    assert len(qmodel[0]) == 3  # the folded BatchNorm keeps its place
    assert len(list(qmodel[:1].parameters())) == 2
    again = pickle.loads(pickle.dumps(qmodel))
    assert len(again) == 2


def test_a_call_of_a_part_says_why_it_cannot_work(pair):
    _, qmodel = pair
    with pytest.raises(CaptureError, match=r"blocks \(Blocks\) was called on its own") as raised:
        qmodel.features(X)
    assert "features is a method of the float model's Net" in raised.value.__notes__[0]
    with pytest.raises(CaptureError, match=r"blocks\.inner\.0\.2 \(ReLU\)"):
        qmodel.blocks[0][2](X)


def test_a_hook_that_will_never_run_is_reported(pair):
    _, qmodel = pair
    heard = []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        with pytest.warns(UserWarning, match=r"blocks\.inner\.0 \(Sequential\).*will not run"):
            getattr(qmodel.blocks[0], register)(lambda *_: heard.append(1)).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = qmodel.blocks[0][0].register_forward_hook(lambda *_: heard.append(1))
    qmodel(X)
    handle.remove()
    assert heard == [1]


def test_hooks_of_the_float_model_are_said_to_be_lost():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), block(4, 4)).eval()
    model[1].register_forward_hook(lambda *_: None)
    (note,) = (note for note in he.plan_of(he.prepare(model, X)).notes if "Hooks" in note)
    assert "those of 1." in note


def test_names_that_a_graph_needs_are_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.graph(x)

    with pytest.raises(CaptureError, match="has graph for itself"):
        he.prepare(Named(), X)


def test_a_class_inside_of_a_function_is_pickled_as_its_nearest_class():
    class Inside(nn.Sequential):
        def extra(self):
            return 1

    qmodel = he.prepare(Inside(block(3, 4), nn.Conv2d(4, 2, 1)).eval(), X)
    assert qmodel.extra() == 1
    again = pickle.loads(pickle.dumps(qmodel))
    assert len(again) == 2
    assert not hasattr(again, "extra")


class Cells(nn.Module):
    """Its cells start with zeros, for as many samples as there are."""

    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(4, 4, 2, batch_first=True, dropout=0.5), nn.Linear(4, 2)

    def forward(self, x, scale):
        y = self.cells(x)[0]
        return {"all": y, "last": [self.out(y[:, -1] * scale)]}


def test_a_pickle_keeps_sizes_keywords_and_the_mode(tmp_path):
    x, scale = torch.randn(2, 3, 4), torch.ones(2, 1)
    qmodel = he.calibrate(he.prepare(Cells().eval(), {"x": x, "scale": scale}), [{"x": x, "scale": scale}])
    again = pickle.loads(pickle.dumps(qmodel))
    inputs = {"scale": torch.rand(3, 1), "x": torch.randn(3, 3, 4)}
    found, right = again(**inputs), qmodel(**inputs)
    assert torch.equal(found["all"], right["all"])
    assert torch.equal(found["last"][0], right["last"][0])
    again.train()
    assert not torch.equal(again(**inputs)["all"], again(**inputs)["all"])  # dropout between the layers
    with pytest.raises(ExportError, match="comes from a pickle"):
        he.export(again, tmp_path / "m.xml")


def test_tied_weights_have_the_float_models_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.mix(self.embed(ids)).relu())

    model = Tied().eval()
    qmodel = he.prepare(model, torch.randint(9, (2, 5)))
    names = [name for name, _ in qmodel.named_parameters() if "quantizer" not in name]
    assert names == [name for name, _ in model.named_parameters()]
    assert list(qmodel.state_dict())[:2] == list(model.state_dict())[:2]
