"""The float model of a checkpoint: with its weights where they can be had, and never with others in silence."""

import timm
from torch import nn

from halfeven.cli.float_model import float_model_of
from halfeven.cli.test import _recorded_metrics
from halfeven.config import DataOptions, Experiment, ModelOptions, TrainingOptions


def found(checkpoint, epochs=0, **model):
    options = {"source": "callable", "name": "torch.nn:Identity"} | model
    pretraining = TrainingOptions(epochs=epochs)
    data = DataOptions(source="digits")
    return float_model_of(Experiment(model=ModelOptions(**options), data=data, pretraining=pretraining), checkpoint)


def test_a_library_whose_weights_cannot_be_downloaded(tmp_path, monkeypatch):
    """A file is verified on the machine that will run it, which may have no network."""

    def offline(name, *, pretrained, **arguments):
        if pretrained:
            raise OSError("no network")
        return nn.Linear(2, 2)

    monkeypatch.setattr(timm, "create_model", offline)
    model, has_weights = found(tmp_path / "best.safetensors", source="timm", name="resnet18", weights="pretrained")
    assert isinstance(model, nn.Linear)
    assert not has_weights


def test_a_function_may_load_weights_itself(tmp_path):
    checkpoint = tmp_path / "best.safetensors"
    assert found(checkpoint)[1]
    assert not found(checkpoint, weights="gone.pth")[1]
    assert not found(checkpoint, epochs=2)[1], "the weights of the float training are gone"


def test_what_halfeven_save_was_given_is_no_table():
    assert _recorded_metrics({"extra": {"float": {"top1": 99.0}}}) == {"top1": 99.0}
    for other in (99.0, "good", {"top1": "good"}, None):
        assert _recorded_metrics({"extra": {"float": other}}) == {}
    assert _recorded_metrics({}) == {}
