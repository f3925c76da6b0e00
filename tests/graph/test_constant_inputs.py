"""Inputs that are no tensors are constants of a captured graph: another value is refused, and never ignored."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CaptureError, InputError
from halfeven.graph.capture import capture

pytestmark = pytest.mark.usefixtures("unfused")

X = torch.randn(4, 8)
MASK = torch.zeros(4, 1)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, mask=None, features=False):
        y = self.body(x).relu()
        y = y if mask is None else y * mask
        return y if features else self.head(y)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, MASK, False), {}, r"mask is a tensor of shape \[4, 1\], and the model was prepared with None"),
        ((X, None, True), {}, "features is True, and the model was prepared with False"),
        ((), {"x": X, "mask": MASK, "features": False}, "mask is a tensor"),
    ],
)
def test_another_value_than_the_examples_is_refused(args, kwargs, message):
    captured, _ = capture(Optional().eval(), (X, None, False))
    assert captured(X, None, False).shape == captured(x=X, mask=None, features=False).shape == (4, 3)
    with pytest.raises(InputError, match=message):
        captured(*args, **kwargs)


def test_inputs_beyond_the_examples_are_refused():
    captured, _ = capture(Optional().eval(), X)
    with pytest.raises(CaptureError, match=r"a further positional input \(Tensor\)"):
        captured(X, MASK)


def test_an_optional_input_in_a_batch_is_not_dropped():
    qmodel = he.prepare(Optional().eval(), (X, None))
    for batch in ((X, MASK), {"x": X, "mask": MASK}):
        with pytest.raises(InputError, match=r"Batch 0 .*mask is a tensor"):
            he.calibrate(qmodel, [batch])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        y = self.layer(x).relu()
        return y if mask is None else y * mask


class CalledInTwoWays(nn.Module):
    """Python that cannot be captured, around a head that is called with a mask and without."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), Head()

    def forward(self, x):
        y = self.stem(x)
        y = y * 2 if float(y.sum()) > 0 else y
        return self.head(y) + self.head(y, torch.ones(y.shape[0], 1))


def test_a_part_whose_calls_differ_is_captured_in_smaller_parts():
    model = CalledInTwoWays().eval()
    captured, report = capture(model, X)
    assert report.regions == ["stem", "head.layer"]
    assert "its calls differ" in str(next(left for left in report.left if left.name == "head"))
    assert torch.allclose(captured(X), model(X), atol=1e-6)
