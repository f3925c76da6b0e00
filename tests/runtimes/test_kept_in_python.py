"""Models whose training does more than their eval mode: trained, saved, loaded, and verified in both runtimes."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import halfeven as he
from runtimes.parity import SCHEME, trained


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Centre(nn.Module):
    """Subtracts a moving average of its inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.full((4,), 0.1))

    def forward(self, x):
        if self.training:
            self.centre.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.centre[:, None, None]


class Maps(nn.Module):
    """Returns raw maps in training, and boxes with the maps in eval mode."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, maps):
        raw = [head(x) for head, x in zip(self.heads, maps, strict=True)]
        return raw if self.training else (torch.cat([x.sigmoid().flatten(2) for x in raw], 2), raw)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.detect = Maps()

    def forward(self, x):
        first = self.stem(x)
        return self.detect([first, self.down(first)])


def inside():
    """All that is kept is a call inside of the graph."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), Noise(), parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), Centre(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip


class Scores(nn.Module):
    """Returns scores in training and probabilities in eval mode, as classifiers do."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, 2, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.body(self.norm(self.stem(x)).relu()).relu().mean((2, 3))
        y = self.head(nn.functional.dropout(x, 0.1, self.training))
        return y if self.training else {"probabilities": y.softmax(1)}


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("build", [inside, Detector, Scores])
def test_the_file_is_that_of_eval_mode_and_equals_the_trained_model(build, target, tmp_path):
    model, x = trained(build()), torch.randn(3, 3, 12, 12)
    qmodel = he.calibrate(he.prepare(model, x, target=target, scheme=SCHEME), [x])
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.01)
    outputs = torch.utils._pytree.tree_leaves(qmodel.train()(x))
    assert [y.shape for y in outputs] == [y.shape for y in torch.utils._pytree.tree_leaves(model.train()(x))]
    sum(y.square().mean() for y in outputs).backward()
    optimizer.step()
    path = tmp_path / ("m.xml" if target == "openvino" else "m.onnx")
    report = he.verify(qmodel.eval(), he.export(qmodel, path), [x], timed=False)
    assert report.integer_match == 1
    assert report.integer_layers == report.quantizable_layers == (4 if build is Detector else 3)
    he.save(qmodel, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", build(), x)
    assert he.plan_of(again).kept == he.plan_of(qmodel).kept
    for y, expected in zip(*(torch.utils._pytree.tree_leaves(m(x)) for m in (again, qmodel)), strict=True):
        assert torch.equal(y, expected)


def test_the_plan_names_what_is_kept_and_can_be_used_to_prepare():
    model, x = inside(), torch.randn(3, 3, 12, 12)
    plan = he.plan(model, x)
    assert {kept.name for kept in plan.kept} == {"2", "3.parametrizations.weight.0", "4"}
    said = " ".join(str(plan).split())
    assert "so that it trains as in float: 2: it draws random numbers in training" in said
    assert he.plan_of(he.prepare(model, x, plan=plan)).kept == plan.kept


def test_the_plan_says_why_the_result_of_a_kept_module_is_in_float():
    plan = he.plan(nn.Sequential(nn.Conv2d(3, 4, 1), Centre()), torch.randn(2, 3, 4, 4))
    assert ("1", "its own code stays Python, for training") in {(left.name, left.reason) for left in plan.left}


def test_a_head_with_other_outputs_in_training_leaves_the_graph_whole():
    plan = he.plan(Detector(), torch.randn(2, 3, 12, 12))
    said = " ".join(str(plan).split())
    assert "The graph returns in training what the float model returns there: detect: it returns a list of 2" in said
    # The maps that the head reads are quantized where they are made, behind the ReLU.
    assert {tensor.name for tensor in plan.tensors} >= {"stem_2_relu", "down_2_relu"}


@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_model_of_the_older_normalizations_is_prepared_after_a_step(normalize):
    model, x = nn.Sequential(normalize(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 8, 8)
    model.train()(x).sum().backward()
    qmodel = he.calibrate(he.prepare(model, x), [x])
    qmodel.train()(x).sum().backward()
    assert torch.isfinite(qmodel.get_parameter("2.weight").grad).all()
    he.calibrate(qmodel, [x])
    assert he.exact(qmodel)(x).shape == (2, 2, 6, 6)


class Checkpointed(nn.Module):
    """Three blocks, each of which may be computed again in the backward pass."""

    def __init__(self, saves_memory):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(3))
        self.saves_memory = saves_memory

    def forward(self, x):
        for block in self.blocks:
            saves = self.saves_memory and self.training
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
        return x


def test_recomputation_moves_no_range_and_no_gradient():
    x = torch.randn(4, 3, 10, 10)
    reference = Checkpointed(saves_memory=False)
    models = []
    for saves_memory in (False, True):
        model = Checkpointed(saves_memory)
        model.load_state_dict(reference.state_dict())
        # In both the blocks are captured one by one, so that they have the same quantizers.
        qmodel = he.calibrate(he.prepare(Checkpointed(True), x, scheme=SCHEME), [x])
        qmodel.load_state_dict({**qmodel.state_dict(), **model.state_dict()})
        qmodel.saves_memory = saves_memory
        he.calibrate(qmodel, [x]).train()(3 * x).square().sum().backward()
        models.append(qmodel)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for (name, value), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(value, other), name
