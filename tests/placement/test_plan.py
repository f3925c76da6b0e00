"""The plan as a value: its print, its way to JSON and back, and what options refuse."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from halfeven.errors import ConfigError
from halfeven.placement.plan import Plan, QuantizationOptions, Rule
from placement.parts import Attention, Residual, conv, plan


def small():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4), nn.AdaptiveAvgPool2d(1))
    return plan(model, scheme="w4a8", batchnorm="keep")


def test_the_summary_as_it_is_printed():
    assert (
        str(small())
        == """\
Plan for openvino, w4a8, learned ranges, BatchNorm keep
2 quantized layers, 3 quantized activations, 0 operators in float

layers  number  weight bits  input bits  weight ranges
Conv2d       2            4           8  mse, then learned

block  layers  weight bits  act. bits  in float
0           1            4                    0
3           1            4          8         0

in float        because
1 layer result  an output of the model: 4.adaptive_avg_pool2d
print(plan.table()) lists every tensor, and all that is in float."""
    )


def test_print_of_all_tensors():
    assert (
        str(small().table())
        == """\
Plan for openvino, w4a8, learned ranges, BatchNorm keep
2 quantized layers, 3 quantized activations, 0 operators in float

activation  scheme         range                 read by
input       u8 asymmetric  mse, then calibrated  0
2.relu      u8 symmetric   mse, then learned     3
3           u8 asymmetric  mse, then learned     4.adaptive_avg_pool2d

weight of  kind    scheme                     range
0          Conv2d  s4 symmetric, per channel  mse, then learned
3          Conv2d  s4 symmetric, per channel  mse, then learned

Computes in integers, result in float:
name                   operator             because
4.adaptive_avg_pool2d  adaptive_avg_pool2d  an output of the model"""
    )


class Deep(nn.Module):
    """Many blocks with long names, of several kinds and bits, and operators in float."""

    def __init__(self, blocks=20):
        super().__init__()
        self.stem = conv(3)
        self.backbone = nn.ModuleDict(
            {
                f"a_stage_of_the_backbone_{i}": nn.Sequential(conv(groups=8 if i % 2 else 1), nn.SiLU(), conv(kernel=1))
                for i in range(blocks)
            }
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.backbone.values():
            x = x + block(x).sigmoid() * x.erf()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def large():
    return plan(Deep(), rules=tuple(Rule(pattern=f"*backbone_{i}.2", weight_bits=2 + i % 6) for i in range(20)))


@pytest.mark.parametrize("notes", [0, 2, 40])
def test_a_large_model_has_a_summary_that_fits_a_screen(large, notes):
    planned = dataclasses.replace(large, notes=tuple(f"Note {i}: {'a long reason ' * 9}" for i in range(notes)))
    lines = str(planned).splitlines()
    assert 10 < len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert any("depthwise" in line or "other kinds" in line for line in lines)
    assert any(line.split()[1:2] == ["operators"] and ":" in line for line in lines), "it says why it is in float"
    whole = str(planned.table())
    assert max(map(len, whole.splitlines())) <= 80
    assert whole.count("Note ") == notes


def test_blocks_count_every_layer():
    lines = str(plan(Deep(4))).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("block "))
    rows = [line.split() for line in lines[first + 1 : lines.index("", first)]]
    assert [row[0] for row in rows if row[0] != "elsewhere"] == [
        "stem",
        *(f"backbone.a_stage_of_the_backbone_{i}" for i in range(4)),
        "head",
    ]
    assert sum(int(row[1]) for row in rows) == 10


def test_layers_in_integers_are_not_said_to_be_in_float():
    planned = plan(Residual())
    text = str(planned.table())
    assert "conv2" in {left.name for left in planned.left}
    assert "Computes in integers, result in float:" in text
    assert "Computes in float:" not in text


class Gate(nn.Conv2d):
    """A layer that holds layers."""

    def __init__(self):
        super().__init__(8, 8, 1)
        self.down, self.middle, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return super().forward(self.up(self.middle(self.down(x).relu()).relu()))


def test_one_layer_is_no_plural_and_a_short_summary_gives_all_reasons():
    made = plan(nn.Sequential(conv(3), nn.ReLU()))
    assert "1 quantized layer, 1 quantized activation, 1 operator in float" in str(made)
    text = str(plan(Reasons(), (2, 3, 8, 8), rules=(Rule(pattern="last", quantize=False),)))
    assert "other reason" not in text


class Reasons(nn.Module):
    """Operators in float for five reasons."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3), conv(8, 4)
        self.register_buffer("bands", torch.rand(8, 8))

    def forward(self, x):
        x = torch.log(self.bands @ self.first(x).relu().erf().sum(1, keepdim=True).expand(-1, 8, -1, -1).square() + 1)
        return self.last(x.softmax(1))


def test_layers_inside_of_a_layer_are_blocks_of_their_own():
    rows = [line.split()[:2] for line in str(plan(nn.Sequential(conv(3), nn.ReLU(), Gate()))).splitlines()]
    for block in ("0", "2", "2.down", "2.middle", "2.up"):
        assert rows.count([block, "1"]) == 1, block


def test_layers_that_read_integers_alone_are_not_said_to_be_in_float():
    """One of two such layers would be, if it makes the output."""
    made = plan(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), shape=(2, 8), scheme="w8a16")
    assert "2 quantized layers, 0 quantized activations, 0 operators in float" in str(made)
    assert "an output of the model" not in f"{made}{made.table()}"


def test_in_a_notebook_all_tensors_are_a_click_away():
    html = small()._repr_html_()
    assert html.count("<pre") == 2
    assert html.index("4.adaptive_avg_pool2d") < html.index("<details>") < html.rindex("4.adaptive_avg_pool2d")


def test_print_says_what_is_learned_fixed_and_noted():
    planned = plan(Attention(), (2, 5, 16), ranges="learned")
    planned = dataclasses.replace(planned, notes=("Stays Python, in float: head: a reason",))
    assert "learned ranges" in str(planned)
    assert "fixed [0.0, 1.0]" in str(planned.table())
    for text in (str(planned), str(planned.table())):
        assert "Stays Python, in float: head: a reason" in text


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
    assert str(again.table()).splitlines()[2:5] == str(planned.table()).splitlines()[2:5]
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
