"""Changes of the graph: made, recorded in the plan, and made again for a checkpoint."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import PlacementError
from halfeven.graph.view import Op, tensor_names
from halfeven.placement.graph_edits import apply_changes, give_bias, record_changes
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.plan import GraphChanges, Plan
from halfeven.quantization.model_quantizers import set_mode
from halfeven.quantization.quantizer import Mode
from placement.parts import captured, conv

IMAGE = (2, 3, 8, 8)


class Clipped(nn.Module):
    """Three ways to write a ReLU with an upper bound, one to clip that is none, and a layer without a bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3), conv(bias=False), conv()
        self.act, self.fc = nn.ReLU6(inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu6(self.one(x) * 9)
        x = F.relu6(self.two(x) * 9)
        x = self.act(self.three(x)).clamp(0, 3)
        return self.fc(F.hardtanh(x).mean((2, 3)))


def clips(model):
    return {name: Op(node).bounds for name, node in tensor_names(model.graph).items() if Op(node).bounds}


def clipped_relus(model):
    """Return the names of the ReLUs with an upper bound: ReLU6, and hardtanh and clamp from 0."""
    bounds = {name: Op(node).bounds for name, (_, node) in named_nodes(model).items()}
    return tuple(name for name, b in bounds.items() if b is not None and b[0] == 0 and 0 < b[1] < float("inf"))


def test_clips_are_found_with_their_bounds():
    assert clips(captured(Clipped())) == {
        "relu6": (0, 6), "relu6_1": (0, 6), "act.hardtanh": (0, 6), "clamp": (0, 3), "hardtanh": (-1, 1)
    }  # fmt: skip
    assert clips(captured(nn.Sequential(nn.ReLU()), IMAGE)) == {"0.relu": (0, float("inf"))}


def test_clipping_of_one_sided_clamps_and_tensors():
    class Net(nn.Module):
        def forward(self, x):
            return x.clamp(max=2).clamp(min=-1).clamp_min(0) * torch.clamp(x, min=x.mean())

    assert clips(captured(Net())) == {
        "clamp": (-float("inf"), 2), "clamp_1": (-1, float("inf")), "clamp_min": (0, float("inf"))
    }  # fmt: skip


def test_unclipping_computes_relu_and_keeps_the_names():
    qmodel = he.prepare(Clipped().eval(), torch.randn(IMAGE))
    places = {place for tensor in he.plan_of(qmodel).tensors for place in tensor.places}
    names = clipped_relus(qmodel)
    assert names == ("relu6", "relu6_1", "act.hardtanh", "clamp")
    record_changes(qmodel, unclipped=("relu6",))
    assert clipped_relus(qmodel) == names[1:]
    record_changes(qmodel, unclipped=("relu6_1", "clamp"))
    assert clips(qmodel)["relu6"] == clips(qmodel)["clamp"] == (0, float("inf"))
    assert clips(qmodel)["act.hardtanh"] == (0, 6)
    assert places <= set(tensor_names(qmodel.graph))
    assert places <= set(tensor_names(copy.deepcopy(qmodel).graph))
    assert he.plan_of(qmodel).changes.unclipped == ("relu6", "relu6_1", "clamp")


def test_unclipped_operators_are_relus():
    model = nn.Sequential(conv(3), nn.ReLU6(), conv(), nn.ReLU6()).eval()
    qmodel = he.prepare(model, torch.randn(IMAGE))
    set_mode(qmodel, Mode.FLOAT)
    record_changes(qmodel, unclipped=clipped_relus(qmodel))
    x = 30 * torch.randn(IMAGE)
    torch.testing.assert_close(qmodel(x), model[2](model[0](x).relu()).relu())
    assert qmodel(x).max() > 6


def test_a_bias_is_given_once_and_changes_nothing():
    qmodel = he.prepare(Clipped().eval(), torch.randn(IMAGE))
    he.calibrate(qmodel, [x := torch.randn(IMAGE)])
    before = qmodel(x)
    bias = give_bias(qmodel, "two")
    assert torch.equal(qmodel(x), before)
    assert torch.equal(bias, torch.zeros(8))
    assert give_bias(qmodel, "two") is bias is qmodel.get_submodule("two").bias
    assert give_bias(qmodel, "fc") is qmodel.get_submodule("fc").bias
    assert he.plan_of(qmodel).changes == GraphChanges(given_biases=("two",))


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 5, 2, bias=False), nn.ConvTranspose2d(3, 6, 2, bias=False)])
def test_biases_of_other_layers(layer):
    model = nn.Sequential(layer)
    qmodel = he.prepare(model.eval(), torch.randn((2, 3, 6, 6)[: layer.weight.ndim]))
    assert give_bias(qmodel, "0").shape == (layer.out_channels,)


def test_save_and_load(tmp_path):
    qmodel = he.prepare(Clipped().eval(), torch.randn(IMAGE), batchnorm="fold")
    record_changes(qmodel, unclipped=clipped_relus(qmodel))
    with torch.no_grad():
        give_bias(qmodel, "two").normal_()
    he.calibrate(qmodel, [torch.randn(IMAGE)]).eval()
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", Clipped(), torch.randn(IMAGE))
    x = torch.randn(3, 3, 8, 8) * 4
    assert torch.equal(loaded(x), qmodel(x))
    assert he.plan_of(loaded) == he.plan_of(qmodel)
    assert clipped_relus(loaded) == ()


def test_changes_in_the_print_and_in_json():
    qmodel = he.prepare(Clipped().eval(), torch.randn(IMAGE))
    assert "given a bias" not in str(he.plan_of(qmodel))
    record_changes(qmodel, unclipped=("relu6",), given_biases=("two",))
    plan = he.plan_of(qmodel)
    for text in (str(plan), str(plan.table())):
        assert "No longer clipped above (ReLU now): relu6" in text
        assert "Layers that were given a bias: two" in text
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_changes_reach_a_model_of_several_regions(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Clipped()

        def forward(self, x):
            return self.body(x) if x.mean() > 100 else self.body(-x)

    qmodel = he.prepare(Branching().eval(), torch.randn(IMAGE))
    assert clipped_relus(qmodel)[0] == "body:relu6"
    record_changes(qmodel, unclipped=("body:relu6_1",), given_biases=("body:two",))
    assert clipped_relus(qmodel) == ("body:relu6", "body:act.hardtanh", "body:clamp")
    he.calibrate(qmodel, [torch.randn(IMAGE)]).eval()
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", Branching(), torch.randn(IMAGE))
    assert torch.equal(loaded(x := torch.randn(IMAGE)), qmodel(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unclipped": ("nothing",)}, "no tensor named nothing"),
        ({"unclipped": ("hardtanh",)}, "hardtanh, not a ReLU"),
        ({"unclipped": ("one",)}, "not a ReLU with an upper bound"),
        ({"given_biases": ("relu6",)}, "relu6, not a convolution"),
    ],
)
def test_changes_that_cannot_be_made(changes, message):
    with pytest.raises(PlacementError, match=message):
        apply_changes(captured(Clipped()), GraphChanges(**changes))
