"""Accuracy of modules and functions; the model's modes are given back."""

from collections import UserDict

import pytest
import torch
from torch import nn

from halfeven.errors import HalfevenError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.tasks import Classification


class Table(nn.Module):
    """Logits that are the input itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.drop = nn.Dropout()

    def forward(self, x):
        assert not self.drop.training
        return x


def pairs(classes=10):
    """Ten rows whose label has rank 1, 2, ... 10 among the logits."""
    logits = torch.stack([torch.arange(classes, dtype=torch.float32).roll(shift) for shift in range(classes)])
    return [(row, torch.tensor(classes - 1)) for row in logits]


def test_top1_and_top5():
    assert evaluate(Table(), evaluation_loader(pairs(), 3), Classification(10)) == {"top1": 10.0, "top5": 50.0}


def test_few_classes_have_no_top5():
    assert evaluate(lambda x: x, evaluation_loader(pairs(4), 3), Classification(4)) == {"top1": 25.0}


def test_modes_are_given_back():
    model = Table().train()
    model.norm.eval()
    evaluate(model, evaluation_loader(pairs(), 5), Classification(10))
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)


def test_modes_are_given_back_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3)).train()
    with pytest.raises(HalfevenError):
        evaluate(model, evaluation_loader(pairs(), 5), Classification(10))
    assert model.training


def test_no_gradients_and_progress():
    model, seen = nn.Linear(10, 10), []

    def call(x):
        y = model(x)
        assert not y.requires_grad
        return y

    evaluate(call, evaluation_loader(pairs(), 4), Classification(10), on_batch=seen.append)
    assert seen == [4, 4, 2]


class TwoInputs(nn.Module):
    """Logits that are the sum of two inputs."""

    def forward(self, left, right):
        return left + right


@pytest.mark.parametrize(
    "form",
    [
        lambda left, right: (left, right),
        lambda left, right: [left, right],
        lambda left, right: {"right": right, "left": left},
        lambda left, right: UserDict(left=left, right=right),
    ],
)
def test_several_inputs_reach_the_model_as_in_training(form):
    loader = [(form(rows - 1.0, torch.ones(5, 10)), labels) for rows, labels in evaluation_loader(pairs(), 5)]
    assert evaluate(TwoInputs(), loader, Classification(10)) == {"top1": 10.0, "top5": 50.0}


def test_samples_of_two_inputs_are_collated_and_validated():
    samples = [((row - 1.0, torch.ones(10)), label) for row, label in pairs()]
    assert evaluate(TwoInputs(), evaluation_loader(samples, 3), Classification(10)) == {"top1": 10.0, "top5": 50.0}


def test_a_task_may_have_a_single_metric():
    class Top1(Classification):
        def metrics(self):
            from torchmetrics.classification import MulticlassAccuracy

            return MulticlassAccuracy(self.num_classes, average="micro")

    assert evaluate(Table(), evaluation_loader(pairs(), 3), Top1(10)) == {"top1": 10.0}
