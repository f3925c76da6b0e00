"""Batches: the example says which entries are inputs, and what does not fit it is an error that names it."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from halfeven.errors import CalibrationError
from halfeven.graph.batches import input_form, inputs_of, label_of

X = torch.randn(2, 3)
Y = torch.zeros(2, dtype=torch.long)
Pair = namedtuple("Pair", "left right label")
Turned = namedtuple("Turned", "label right left")


@dataclass
class Fields:
    """A batch as a collate function of one's own makes it."""

    right: torch.Tensor
    left: torch.Tensor
    labels: torch.Tensor | None = None


class Two(nn.Module):
    def forward(self, left, right):
        return left + right


def form(*args, **kwargs):
    return input_form(Two(), (args, kwargs))


def assert_inputs(found, args=(), kwargs=None):
    assert len(found[0]) == len(args)
    assert all(a is b for a, b in zip(found[0], args, strict=True))
    assert list(found[1]) == list(kwargs or {})
    assert all(found[1][name] is value for name, value in (kwargs or {}).items())


@pytest.mark.parametrize("batch", [X, (X,), (X, Y), [X, "names", 3], ((X,), Y), {"left": X, "labels": Y}])
def test_a_batch_of_one_input_gives_that_input(batch):
    assert_inputs(inputs_of(batch, form(X)), (X,))


Z = torch.randn(2, 3)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Z),
        [X, Z],
        (X, Z, Y),
        Pair(X, Z, Y),
        Turned(Y, Z, X),
        Fields(Z, X),
        (Fields(Z, X), Y),
        ((X, Z), Y),
        [[X, Z], Y],
        {"right": Z, "left": X, "labels": Y},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_as_many_inputs_as_the_example_has(batch):
    assert_inputs(inputs_of(batch, form(X, Z)), (X, Z))


@pytest.mark.parametrize(
    "batch",
    [
        {"right": Z, "left": X},
        {"left": X, "right": Z, "labels": Y, "names": ["a", "b"]},
        ({"left": X, "right": Z}, Y),
        UserDict(left=X, right=Z, label=Y),
        Turned(Y, Z, X),
        Fields(Z, X, Y),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_names_and_their_order_are_the_examples(batch):
    assert_inputs(inputs_of(batch, form(left=X, right=Z)), (), {"left": X, "right": Z})


def test_what_is_no_tensor_may_be_left_out():
    assert_inputs(inputs_of({"left": X}, form(left=X, right=None)), (), {"left": X, "right": None})
    assert_inputs(inputs_of(X, form(X, None)), (X, None))
    assert_inputs(inputs_of((X, Y), form(left=X, right=True)), (), {"left": X, "right": True})
    # A label in the place of a switch is a label.
    assert_inputs(inputs_of((X, Y), form(X, True)), (X, True))
    assert label_of((X, Y), form(X, True)) is label_of((X, True, Y), form(X, True)) is Y
    assert label_of((X, Y), form(left=X, right=True)) is Y


def test_an_argument_may_be_a_list_of_tensors():
    found = inputs_of(([X, Z], Y), form([X, Z]))
    assert found[0][0][1] is Z


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, Z, Y), Y),
        (((X, Z), Y), Y),
        ({"left": X, "right": Z, "labels": Y}, Y),
        ((X, Z), None),
        (X, None),
        ((), None),
        (Pair(X, Z, Y), Y),
        (Turned(Y, Z, X), Y),
        (Fields(Z, X, Y), Y),
        (Fields(Z, X), None),
        ({"left": X, "right": Z, "target": Y, "index": X}, Y),
    ],
    ids=range(11),
)
def test_the_label_follows_the_inputs(batch, expected):
    assert label_of(batch, form(X, Z)) is expected


def test_a_label_that_the_model_requires_is_an_input():
    class Loss(nn.Module):
        def forward(self, x, labels):
            return x.mean() + labels.sum()

    required = input_form(Loss(), ((), {"x": X, "labels": Y}))
    assert_inputs(inputs_of({"x": X, "labels": Y}, required), (), {"x": X, "labels": Y})
    assert label_of({"x": X, "labels": Y}, required) is None


WRONG = {
    "None": ((X, None), 'Batch 7 .* "right" as None'),
    "numpy": ((X, np.zeros((2, 3))), '"right" as a numpy array.*as_tensor'),
    "a list": ((X, [1.0, 2.0]), '"right" as a list'),
    "axes": ((X, torch.zeros(2, 3, 4)), r'"right" as a tensor of shape \[2, 3, 4\].*example.*\[\*, 3\]'),
    "empty": ((X, torch.zeros(0, 3)), '"right" as an empty tensor'),
    "float64": ((X, Z.double()), '"right" as a tensor of torch.float64.*to\\(torch.float32\\)'),
    "integers": ((X, torch.ones(2, 3, dtype=torch.long)), "torch.int64"),
    "too few": ((X,), "holds 1 of the model's 2 inputs"),
    "a tensor alone": (X, "holds 1 of the model's 2 inputs"),
    "nothing": ((), "holds 0 of"),
    "None alone": (None, '"left" as None|holds 1 of'),
    "a key lacks": ({"left": X}, "has no right"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_with_its_batch(name):
    batch, message = WRONG[name]
    with pytest.raises(CalibrationError, match=message) as raised:
        inputs_of(batch, form(X, Z), 7)
    assert "Batch 7" in str(raised.value)


def test_a_batch_without_names_for_a_model_of_names_is_refused():
    with pytest.raises(CalibrationError, match="names no inputs"):
        inputs_of((X, Z), form(left=X, right=Z))


def test_a_converted_model_takes_its_own_type():
    model = nn.Sequential(nn.Linear(3, 2)).bfloat16()
    converted = input_form(model, ((X,), {}))
    assert_inputs(inputs_of(half := X.bfloat16(), converted), (half,))
    with pytest.raises(CalibrationError, match=r"converted to torch\.bfloat16"):
        inputs_of(X, converted)
