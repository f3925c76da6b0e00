"""The plan as a value: its print, its way to JSON and back, and what options refuse."""

import dataclasses
import json

import pytest
from torch import nn

from halfeven.errors import ConfigError
from halfeven.placement.plan import Plan, QuantizationOptions, Rule
from placement.parts import Attention, Residual, conv, plan


def test_print():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4), nn.AdaptiveAvgPool2d(1))
    assert (
        str(plan(model, scheme="w4a8", batchnorm="keep"))
        == """\
Plan for openvino, w4a8, observed ranges, BatchNorm keep: 2 layers with quantized weights, 3 quantized activations.

activation  scheme                    range  read by
----------  ------------------------  -----  ---------------------
input       u8 asymmetric per tensor  mse    0
2.relu      u8 symmetric per tensor   mse    3
3           u8 asymmetric per tensor  mse    4.adaptive_avg_pool2d

weight of  scheme                                    range
---------  ----------------------------------------  -----
0          s4 symmetric narrow per channel (axis 0)  mse
3          s4 symmetric narrow per channel (axis 0)  mse

output in float        operator             because
---------------------  -------------------  ----------------------
4.adaptive_avg_pool2d  adaptive_avg_pool2d  an output of the model"""
    )


def test_print_says_what_is_learned_fixed_and_noted():
    planned = plan(Attention(), (2, 5, 16), ranges="learned")
    text = str(dataclasses.replace(planned, notes=("Stays Python, in float: head: a reason",)))
    assert "learned ranges" in text
    assert "fixed [0.0, 1.0]" in text
    assert text.endswith("Stays Python, in float: head: a reason")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranges": "learned", "scheme": "w4a6", "per_channel": False},
        {"rules": (Rule(pattern="conv1", weight_bits=4), Rule(kind="linear", quantize=False, pattern="*"))},
        {"ranges": "clipped", "scale_domain": "log", "learn_zero_points": True, "first_and_last_bits": 8},
        {"quantize_outputs": True, "activation_observer": "lp"},
        {"leave_out": ("last",), "activation_observer": "entropy", "weight_observer": "mse", "batchnorm": "fold"},
    ],
)
def test_json_and_back(options):
    class Net(Residual):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(super().forward(x).mean((2, 3)))

    planned = plan(Net(), **options)
    again = Plan.from_dict(json.loads(json.dumps(planned.to_dict())))
    assert again == planned
    assert hash(again.options) == hash(planned.options)
    assert str(again) == str(planned)


def test_json_and_back_with_a_fixed_range():
    planned = plan(Attention(), (2, 5, 16))
    assert any(tensor.fixed_range for tensor in planned.tensors)
    assert Plan.from_dict(json.loads(json.dumps(planned.to_dict()))) == planned


def of_version_0_1_0(planned):
    """The plan as halfeven 0.1.0 wrote it."""
    values = json.loads(json.dumps(planned.to_dict()))
    for option in ("scale_domain", "learn_zero_points", "first_and_last_bits"):
        del values["options"][option]
    for one in (*values["tensors"], *values["weights"]):
        one["learned"] = one.pop("ranges") == "learned"
    return values


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_a_plan_of_version_0_1_0_is_read(ranges):
    planned = plan(Residual(), ranges=ranges, scheme="w4a4")
    assert {one.ranges for one in (*planned.tensors, *planned.weights)} == {ranges}
    assert Plan.from_dict(of_version_0_1_0(planned)) == planned


def test_a_fixed_range_of_version_0_1_0_stays_fixed():
    planned = plan(Attention(), (2, 5, 16), ranges="learned", scheme="w4a4")
    again = Plan.from_dict(of_version_0_1_0(planned))
    assert [t.fixed_range for t in again.tensors] == [None, None, (0, 1), None]
    assert [t.ranges == "learned" for t in again.tensors] == [True, True, False, True]
    assert again.weights == planned.weights


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranges", "static"),
        ("scale_domain", "exponential"),
        ("batchnorm", "fuse"),
        ("weight_observer", "histogram"),
        ("activation_observer", "max"),
        ("activation_observer", "cross_entropy"),  # of no tensor but the scores of classes
        ("weight_observer", "cross_entropy"),
    ],
)
def test_unknown_choices_list_the_known(field, value):
    with pytest.raises(ConfigError, match=f'QuantizationOptions.{field}="{value}" must be ') as caught:
        QuantizationOptions(**{field: value})
    known = {"ranges": "learned", "scale_domain": "log", "batchnorm": "keep"}
    assert known.get(field, "minmax") in str(caught.value)
