"""Labels inside forward: with them the loss as in float, without them the graph that is deployed."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import halfeven as he
from halfeven.errors import CalibrationError, CaptureError, InputError

pytestmark = pytest.mark.usefixtures("unfused")

IDS = torch.randint(20, (4, 6))
LABELS = torch.randint(3, (4,))


class Classifier(nn.Module):
    """As models of transformers have it: a loss with class weights, and a part of the outputs before the loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        x = x if attention_mask is None else x * attention_mask[:, :, None]
        logits = self.out(self.mix(x).relu().mean(1))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, 3), labels.view(-1), weight=self.weight)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class LanguageModel(nn.Module):
    """Shifted tokens, two losses, a constant made in forward, and outputs in a tuple."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids, labels=None):
        logits = self.out(self.embed(ids).relu())
        if labels is None:
            return (logits,)
        shifted = logits[:, :-1].reshape(-1, 20)
        smooth = (torch.tensor(0.1) * logits.logsumexp(-1)).mean()
        return F.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=-100) + smooth, logits


class Spans(nn.Module):
    """Two labels with names of their own."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, ids, start_positions=None, end_positions=None):
        start, end = self.out(self.embed(ids)).unbind(-1)
        if start_positions is None:
            return start, end
        return F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions), start, end


def assert_close(found, expected):
    for mine, its in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.allclose(mine, its, atol=1e-5)


MODELS = {
    "classifier": (Classifier, {"input_ids": IDS, "attention_mask": torch.ones(4, 6), "labels": LABELS}, 2),
    "language model": (LanguageModel, {"ids": IDS, "labels": IDS.masked_fill(IDS == 3, -100)}, 1),
    "spans": (Spans, {"ids": IDS, "start_positions": LABELS, "end_positions": LABELS + 1}, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_float_models(name):
    build, batch, inputs = MODELS[name]
    model = build().eval()
    captured = he.prepare(model, batch)
    for quantizer in captured.quantizers.children():
        quantizer.mode = type(quantizer.mode).FLOAT
    for module in captured.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.mode = type(module.weight_quantizer.mode).FLOAT
    plain = dict(list(batch.items())[:inputs])
    assert_close(captured(**batch), model(**batch))
    assert_close(captured(**plain), model(**plain))
    assert_close(captured(*batch.values()), model(**batch))
    larger = {key: torch.cat([value, value[:1]]) for key, value in batch.items()}
    assert_close(captured(**larger), model(**larger))
    assert set(inspect.signature(captured.forward).parameters) == set(batch)


def test_a_trainers_loop_with_labels_from_calibration_to_the_file(tmp_path):
    build, batch, _ = MODELS["classifier"]
    model = build().eval()
    qmodel = he.calibrate(he.prepare(model, batch, scheme="w7a8"), [batch, batch]).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = qmodel(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    qmodel.eval()
    he.export(qmodel, tmp_path / "m.xml")
    report = he.verify(qmodel, tmp_path / "m.xml", [batch], model, timed=True)
    assert report.integer_match == 1
    assert set(report.accuracy) == {"float", "simulated", "deployed"}
    he.save(qmodel, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", model, batch)
    for copied in (again, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_close(copied(**batch), qmodel(**batch))
    assert set(qmodel.state_dict()) == set(he.prepare(model, dict(list(batch.items())[:2])).state_dict())


def test_a_model_prepared_without_labels_says_how_to_give_them():
    build, batch, _ = MODELS["classifier"]
    qmodel = he.prepare(build().eval(), {"input_ids": IDS})
    with pytest.raises(CaptureError, match=r"called with attention_mask, labels, .* takes only input_ids"):
        qmodel(**batch)


def test_a_loss_beyond_the_outputs_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.out, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x, labels=None):
            x = self.features(x)
            y = self.out(x)
            return y if labels is None else (F.cross_entropy(self.other(x), labels), y)

    with pytest.raises(CaptureError, match=r"reads the parameter (features|other)\.(weight|bias)"):
        he.prepare(Hidden().eval(), (torch.randn(4, 4), LABELS))


def test_labels_of_free_sizes():
    model = LanguageModel().eval()
    tokens = {1: "tokens"}
    qmodel = he.prepare(model, {"ids": IDS, "labels": IDS}, dynamic_shapes={"ids": tokens, "labels": tokens})
    he.calibrate(qmodel, [{"ids": IDS, "labels": IDS}])
    ids = torch.randint(20, (3, 9))
    assert qmodel(ids, labels=ids)[0].ndim == 0
    assert qmodel(ids)[0].shape == (3, 9, 20)


class Masked(nn.Module):
    """Labels between the inputs."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None, mask=None, scaled=True):
        y = self.out(self.mix(x).relu() * mask)
        y = y * 2 if scaled else y
        return y if labels is None else (F.cross_entropy(y, labels), y)


@pytest.mark.parametrize("example", ["labels", "no labels", "a switch"])
def test_labels_between_the_inputs(example, tmp_path):
    model = Masked().eval()
    x, mask = torch.randn(4, 6), torch.rand(4, 8)
    given = {
        "labels": (x, LABELS, mask), "no labels": (x, None, mask), "a switch": (x, None, mask, False),
    }[example]  # fmt: skip
    qmodel = he.prepare(model, given, scheme="w7a8")
    for batch in (given, (x, LABELS, mask), {"x": x, "mask": mask}):
        he.calibrate(qmodel, [batch])
    with pytest.raises(
        CalibrationError, match=r"holds 2 of the example's . entries \(x, labels, mask.*None for labels"
    ):
        he.calibrate(qmodel, [(x, mask)])
    if example == "labels":
        assert_close(qmodel(x, LABELS, mask)[1], qmodel(x, None, mask))
        assert_close(pickle.loads(pickle.dumps(qmodel))(x, LABELS, mask), qmodel(x=x, mask=mask, labels=LABELS))
    path = he.export(qmodel.eval(), tmp_path / ("m.onnx" if example == "labels" else "m.xml"))
    report = he.verify(qmodel, path, [(x, LABELS, mask)], model, timed=False)
    assert report.integer_match == report.alone_match == 1.0
    assert set(report.accuracy) == {"float", "simulated", "deployed"}


def test_an_input_behind_the_labels_is_not_left_out():
    x, mask = torch.randn(4, 6), torch.rand(4, 8)
    qmodel = he.prepare(Masked().eval(), (x, LABELS, mask))
    with pytest.raises(InputError, match="The input mask is None"):
        qmodel(x, LABELS)
