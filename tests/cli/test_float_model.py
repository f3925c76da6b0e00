"""The float model of a checkpoint: with its weights where they can be had, and never with others in silence."""

from types import SimpleNamespace

import timm
from torch import nn

from halfeven.cli.float_model import float_model_of, loads_own_weights, tell_own_weights
from halfeven.cli.test import _recorded_metrics
from halfeven.config import DataOptions, Experiment, ModelOptions, TrainingOptions


def experiment(epochs=0, **model):
    options = {"source": "callable", "name": "torch.nn:Identity"} | model
    data, pretraining = DataOptions(source="digits"), TrainingOptions(epochs=epochs)
    return Experiment(model=ModelOptions(**options), data=data, pretraining=pretraining)


def test_a_library_whose_weights_cannot_be_downloaded(tmp_path, monkeypatch):
    """A file is verified on the machine that will run it, which may have no network."""

    def offline(name, *, pretrained, **arguments):
        if pretrained:
            raise OSError("no network")
        return nn.Linear(2, 2)

    monkeypatch.setattr(timm, "create_model", offline)
    made = experiment(source="timm", name="resnet18", weights="pretrained")
    model, has_weights = float_model_of(made, tmp_path / "best.safetensors")
    assert isinstance(model, nn.Linear)
    assert not has_weights


def test_weights_that_are_gone_are_not_taken_for_those_of_the_users_function(tmp_path):
    """A diagnosis would compare with random numbers."""
    for changes in ({"weights": "gone.pth"}, {"epochs": 2}):
        made = experiment(**changes)
        assert not float_model_of(made, tmp_path / "best.safetensors")[1]
        assert not loads_own_weights(made)
    assert loads_own_weights(experiment())


def test_weights_of_the_users_function_are_told():
    """A function that returns an untrained model would be quantized without a word."""
    told = []
    for made in (experiment(), experiment(weights="float.pth"), experiment(epochs=1)):
        tell_own_weights(SimpleNamespace(experiment=made, log=told.append))
    assert told == ['model.weights is "": the float weights are those of the model that torch.nn:Identity returns.']


def test_what_halfeven_save_was_given_is_no_table():
    assert _recorded_metrics({"extra": {"float": {"top1": 99.0}}}) == {"top1": 99.0}
    for other in (99.0, "good", {"top1": "good"}, None):
        assert _recorded_metrics({"extra": {"float": other}}) == {}
    assert _recorded_metrics({}) == {}
