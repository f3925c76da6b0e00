"""Arithmetic on coordinates stays in float, and layers do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfeven.placement.plan import Rule
from placement.parts import conv, places, plan

RUNTIMES = ("openvino", "onnxruntime", "tensorrt")
LAYERS = 2


class Distances(nn.Module):
    """Expectations over bins, by a convolution with fixed weights, by a linear function, or by products and a sum."""

    def __init__(self, how):
        super().__init__()
        self.body, self.head, self.how = conv(3), nn.Conv2d(8, 16, 1), how
        self.bins = nn.Conv2d(4, 1, 1, bias=False).requires_grad_(False)
        self.bins.weight.copy_(torch.arange(4.0).reshape(1, 4, 1, 1))
        self.register_buffer("steps", torch.arange(4.0))

    def forward(self, x):
        x = self.head(self.body(x)).flatten(2)
        if self.how == "convolution":
            return self.bins(x.reshape(len(x), 4, 4, -1).transpose(1, 2).softmax(1)).reshape(len(x), 4, -1)
        x = x.transpose(1, 2).reshape(len(x), -1, 4, 4).softmax(-1)
        return F.linear(x, self.steps[None]).squeeze(-1) if self.how == "linear" else (x * self.steps).sum(-1)


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("how", ["convolution", "linear", "sum"])
def test_expectations_over_bins(how, target):
    planned = plan(Distances(how), target=target)
    assert [weight.name for weight in planned.weights] == ["body", "head"]
    assert not any("softmax" in place for group in places(planned) for place in group)
    reasons = [left.reason for left in planned.left if "expectation" in left.reason]
    assert len(reasons) == (how != "sum")


def test_a_rule_quantizes_an_expectation_all_the_same():
    planned = plan(Distances("convolution"), rules=(Rule(pattern="bins", quantize=True),))
    assert [weight.name for weight in planned.weights] == ["body", "head", "bins"]
    assert not any("expectation" in left.reason for left in planned.left)


class Queries(nn.Module):
    """A position is embedded by a linear layer, as RT-DETR's decoder does; a gate of as few channels is read too."""

    def __init__(self):
        super().__init__()
        self.points, self.position, self.narrow = nn.Linear(6, 4), nn.Linear(4, 8), nn.Linear(8, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(F.relu(self.narrow(self.position(self.points(x).sigmoid()))))


@pytest.mark.parametrize("target", RUNTIMES)
def test_layers_that_read_coordinates(target):
    planned = plan(Queries(), (2, 5, 6), target=target)
    assert [weight.name for weight in planned.weights] == ["points", "narrow", "last"]
    (left,) = [left for left in planned.left if left.name == "position"]
    assert "4 coordinates" in left.reason
    assert len(plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (2, 4), target=target).weights) == 2


class Decoder(nn.Module):
    """Boxes from four distances, and scores from two maps; boxes and scores leave in one tensor."""

    def __init__(self, joined):
        super().__init__()
        self.body, self.boxes, self.scores, self.centre = conv(3), conv(8, 4), conv(8, 5), conv(8, 1)
        self.joined = joined

    def forward(self, x):
        x = self.body(x).relu()
        boxes, scores, centre = self.boxes(x), self.scores(x), self.centre(x)
        if self.joined:
            x = torch.cat([boxes, scores, centre], 1).flatten(2)
            boxes, scores, centre = x.split((4, 5, 1), 1)
        near, far = boxes.chunk(2, 1)
        size = (near + far) * 8
        middle = (far - near) * 4
        return torch.cat([middle, size, scores.sigmoid() * centre.sigmoid()], 1)


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("joined", [False, True])
def test_boxes_are_decoded_in_float_and_share_no_range_with_scores(joined, target):
    planned = plan(Decoder(joined), target=target)
    assert len(planned.weights) == 4
    assert all(len(group) == 1 for group in places(planned))
    quantized = {place for group in places(planned) for place in group}
    outside = ("add", "sub", "mul", "sigmoid", "cat", "chunk", "split")
    assert not any(word in place for place in quantized for word in outside)
    if target == "onnxruntime":
        assert {left.name for left in planned.left if "decodes" in left.reason} >= {"add", "sub"}


def test_a_sum_of_whole_feature_maps_at_the_end_stays_in_integers():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(3), conv()

        def forward(self, x):
            x = self.first(x).relu()
            return x + self.second(x)

    assert places(plan(Ends())) == [("x",), ("relu",)]
    assert ("add",) in places(plan(Ends(), target="onnxruntime"))
