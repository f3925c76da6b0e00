"""Where quantizers go, rule by rule."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfeven.errors import ConfigError, PlacementError
from halfeven.placement.plan import Rule
from placement.parts import IMAGE, Attention, Residual, conv, places, plan


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def scheme_of(planned, place):
    (tensor,) = [tensor for tensor in planned.tensors if place in tensor.places]
    return str(tensor.scheme).removesuffix(" per tensor")


def reason_of(planned, name):
    (left,) = [left for left in planned.left if left.name == name]
    return left.reason


# Layers and activations


def test_one_quantizer_after_conv_norm_and_activation():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.SiLU(), conv())
    planned = plan(model)
    assert places(planned) == [("input",), ("2.relu",), ("4.silu",)]
    assert [w.name for w in planned.weights] == ["0", "3", "5"]
    assert reason_of(planned, "5") == "an output of the model"


@pytest.mark.parametrize(
    ("activation", "scheme"),
    [
        (nn.ReLU(), "u8 symmetric"),
        (nn.ReLU6(), "u8 symmetric"),
        (nn.Hardtanh(0, 3), "u8 symmetric"),
        (nn.Hardtanh(-1, 3), "u8 asymmetric"),
        (nn.Sigmoid(), "u8 symmetric"),
        (nn.Softplus(), "u8 symmetric"),
        (nn.SiLU(), "u8 asymmetric"),
        (nn.Hardswish(), "u8 asymmetric"),
        (nn.GELU(), "u8 asymmetric"),
        (nn.LeakyReLU(), "u8 asymmetric"),
        (nn.Tanh(), "u8 asymmetric"),
        (nn.PReLU(), "u8 asymmetric"),
        (nn.Identity(), "u8 asymmetric"),
    ],
)
def test_zero_point_0_after_what_is_never_negative(activation, scheme):
    planned = plan(nn.Sequential(conv(3), activation, conv()))
    (tensor,) = [t for t in planned.tensors if "2" in t.consumers]
    assert scheme_of(planned, tensor.places[0]) == scheme


def test_non_negative_survives_pools_and_products_and_sums():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.c = conv(3), conv(), conv(), conv()

        def forward(self, x):
            x = F.relu(self.stem(x))
            y = self.a(F.avg_pool2d(x, 2))
            z = self.b(x * torch.sigmoid(x))
            return F.interpolate(y, scale_factor=2.0), z, self.c(x - x.flip(1))

    planned = plan(Net())
    assert scheme_of(planned, "avg_pool2d") == "u8 symmetric"
    assert scheme_of(planned, "mul") == "u8 symmetric"
    assert scheme_of(planned, "sub") == "u8 asymmetric"


def test_weights_are_narrow_and_symmetric_per_output_channel():
    model = nn.Sequential(conv(3), nn.ConvTranspose2d(8, 6, 2), nn.ConvTranspose2d(6, 4, 2, groups=2), conv(4, 5))
    planned = plan(model, target="tensorrt")
    found = [(w.name, str(w.scheme), w.channels) for w in planned.weights]
    assert found == [
        ("0", "s8 symmetric narrow per channel (axis 0)", 8),
        ("1", "s8 symmetric narrow per channel (axis 1)", 6),
        ("2", "s8 symmetric narrow per tensor", None),  # grouped: its output channels are no axis of the weight
        ("3", "s8 symmetric narrow per channel (axis 0)", 5),
    ]
    planned = plan(model, target="tensorrt", per_channel=False)
    assert {w.channels for w in planned.weights} == {None}
    assert {w.scheme.axis for w in planned.weights} == {None}


def test_a_tensor_that_several_read_has_one_quantizer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = conv(3), conv(), conv()

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.a(x), self.b(x)

    planned = plan(Net())
    assert places(planned) == [("x",), ("relu",)]
    assert planned.tensors[1].consumers == ("a", "b")


# Additions


@pytest.mark.parametrize("skip_first", [False, True])
def test_residual_quantizes_the_skip_and_not_the_branch(skip_first):
    planned = plan(Residual(skip_first))
    assert places(planned) == [("x",), ("relu",), ("relu_1",), ("relu_2",)]
    assert "add" in planned.tensors[1].consumers
    assert "fused with the addition" in reason_of(planned, "conv2")


@pytest.mark.parametrize("skip_first", [False, True])
def test_residual_with_a_convolution_on_the_skip_quantizes_one_side(skip_first):
    planned = plan(Residual(skip_first, down=True))
    flat = [place for group in places(planned) for place in group]
    assert ("norm" in flat) != ("down.1" in flat)
    assert "relu_2" in flat
    assert sum("fused with the addition" in left.reason for left in planned.left) == 1


def test_addition_of_linear_layers_in_a_transformer_stays_in_float():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.a(x)
            return self.b(F.layer_norm(x, (8,)))

    planned = plan(Net(), (2, 4, 8))
    assert places(planned) == [("x",), ("layer_norm",)]
    assert reason_of(planned, "add") == "its readers compute in float (layer_norm)"


def test_addition_of_activated_convolutions_quantizes_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3), conv(3), conv()

        def forward(self, x):
            return self.c(F.relu(self.a(x)) + F.relu(self.b(x)))

    assert places(plan(Net())) == [("x",), ("relu",), ("relu_1",), ("add",)]


def test_adding_a_number_or_a_parameter_quantizes_nothing_more():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bias = conv(3), conv(), nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, x):
            return self.b(self.a(x) + 1.0 + self.bias)

    assert places(plan(Net())) == [("x",), ("add_1",)]


# Operators that keep the scale


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.PixelShuffle(2),
        nn.PixelUnshuffle(2),
        nn.Dropout(),
        nn.Identity(),
        Function(lambda x: x.transpose(2, 3).contiguous()),
        Function(lambda x: x[:, :, ::2]),
        Function(lambda x: x.flip(1).roll(1, 2)),
        Function(lambda x: torch.cat(x.chunk(2, 1), 1)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_nothing_after_what_keeps_the_scale(layer):
    middle = nn.Sequential(conv(3), nn.ReLU(), layer)
    channels = middle(torch.zeros(IMAGE)).shape[1]
    planned = plan(nn.Sequential(*middle, conv(channels, 4)))
    assert places(planned) == [("input",), ("1.relu",)]
    assert planned.tensors[1].consumers == ("3",)


def test_concat_shares_one_quantizer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3), conv(3, 4), conv(12), conv(20)

        def forward(self, x):
            a, b = F.relu(self.a(x)), self.b(x)
            both = torch.cat([a, b], 1)
            c = F.relu(self.c(both))
            return self.d(torch.cat([both, c], 1))

    planned = plan(Net())
    assert places(planned) == [("x",), ("relu", "b", "relu_1")]
    assert scheme_of(planned, "relu") == "u8 asymmetric"  # one of them may be negative


# Pools, pads, interpolation


@pytest.mark.parametrize(
    ("pool", "scheme"),
    [
        (nn.AvgPool2d(2), "u8 asymmetric"),
        (nn.AvgPool2d(3, 2, 1), "s8 symmetric"),  # it pads with level 0
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "u8 asymmetric"),
        (nn.AdaptiveAvgPool2d(1), "u8 asymmetric"),
        (Function(lambda x: x.mean((2, 3), keepdim=True)), "u8 asymmetric"),
    ],
)
def test_averages_have_quantizers_before_and_after(pool, scheme):
    planned = plan(nn.Sequential(conv(3), pool, conv()))
    assert len(planned.tensors) == 3
    assert scheme_of(planned, "0") == scheme
    assert planned.tensors[2].consumers == ("2",)


class Averaged(nn.Module):
    """An average of integers, and a function of two tensors that reads it and another one of integers."""

    def __init__(self, reader, *, then=None):
        super().__init__()
        self.stem, self.norm, self.last = conv(3), nn.BatchNorm2d(8), conv(8)
        self.reader, self.then = reader, then or nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        return self.last(F.relu(self.norm(self.then(self.reader(F.avg_pool2d(x, 3, 1, 1), x)))))


@pytest.mark.parametrize(
    ("reader", "then", "rounded"),
    [
        (lambda average, x: torch.sigmoid(average) + torch.sigmoid(x), None, False),
        (lambda average, x: average * x, None, True),
        (lambda average, x: F.max_pool2d(average, 3, 1, 1), None, True),  # a BatchNorm reads it behind the pool
        (lambda average, x: torch.sigmoid(average), None, False),
        (lambda average, x: average, None, True),  # a BatchNorm
        (lambda average, x: x.mean((2, 3), keepdim=True), None, False),  # a BatchNorm alone, behind a mean
        (lambda average, x: average * 2.0, nn.Sigmoid(), True),
    ],
)
def test_openvino_rounds_an_average_that_is_read_as_bytes(reader, then, rounded):
    for target in ("openvino", "onnxruntime"):
        planned = plan(Averaged(reader, then=then), target=target)
        own = [tensor for tensor in planned.tensors if tensor.consumers == ("a reader that computes with bytes",)]
        assert len(own) == (rounded and target == "openvino")
        assert all("avg_pool2d" in place for tensor in own for place in tensor.places)


def test_a_rule_leaves_an_average_in_float():
    model = Averaged(lambda average, x: F.max_pool2d(average, 3, 1, 1))
    rule = Rule(kind="average", quantize=False)
    assert ("avg_pool2d",) in places(plan(model))
    assert ("avg_pool2d",) not in places(plan(model, rules=(rule,)))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.ZeroPad2d(1), "2.pad"),
        (nn.ReflectionPad2d(1), "2.pad"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "2.upsample_bilinear2d"),
        (nn.GroupNorm(2, 8), "2"),
    ],
)
def test_a_quantizer_after_what_has_its_own_scale(layer, name):
    planned = plan(nn.Sequential(conv(3), nn.ReLU(), layer, conv()))
    assert places(planned) == [("input",), (name,)]


def test_a_gate_has_a_quantizer_after_the_product():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.reduce, self.expand, self.last = conv(3), conv(8, 4, 1), conv(4, 8, 1), conv()

        def forward(self, x):
            x = F.relu(self.stem(x))
            y = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
            return self.last(x * torch.sigmoid(self.expand(y)))

    planned = plan(Net())
    assert places(planned) == [("x",), ("relu",), ("mean",), ("relu_1",), ("mul",)]
    assert scheme_of(planned, "mul") == "u8 symmetric"


# Transposed convolutions and attention


def test_a_transposed_convolution_takes_no_zero_point():
    planned = plan(nn.Sequential(conv(3), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)))
    assert scheme_of(planned, "0") == "s8 symmetric"
    assert scheme_of(planned, "2.relu") == "u8 symmetric"
    assert scheme_of(planned, "input") == "u8 asymmetric"


def test_attention_has_one_symmetric_quantizer_after_the_linear_layer():
    planned = plan(Attention(), (2, 5, 16))
    assert places(planned) == [("x",), ("qkv",), ("softmax",), ("matmul_1",)]
    assert scheme_of(planned, "qkv") == "s8 symmetric"
    assert scheme_of(planned, "softmax") == "u8 symmetric"
    assert [t.fixed_range for t in planned.tensors] == [None, None, (0.0, 1.0), None]
    assert reason_of(planned, "matmul") == "its readers compute in float (mul)"


def test_learned_ranges_but_not_the_softmaxs():
    planned = plan(Attention(), (2, 5, 16), ranges="learned", scheme="w4a4")
    assert [t.ranges for t in planned.tensors] == ["learned", "learned", "calibrated", "learned"]
    assert {w.ranges for w in planned.weights} == {"learned"}


def test_an_input_of_8_bits_keeps_its_calibrated_range_where_others_are_learned():
    for ranges in ("learned", "clipped"):
        assert [t.ranges for t in plan(net(), ranges=ranges).tensors] == ["calibrated", *[ranges] * 4]
        assert [t.ranges for t in plan(net(), ranges=ranges, scheme="w4a4").tensors] == [ranges] * 5
        both = plan(net(), ranges=ranges, scheme="w4a4", first_and_last_bits=8)
        assert [t.ranges for t in both.tensors] == ["calibrated", *[ranges] * 4]
        assert {w.ranges for w in both.weights} == {"learned"}
    assert {t.ranges for t in plan(net()).tensors} == {"observed"}


@pytest.mark.parametrize(("paper", "ranges"), [("lsq", "learned"), ("pact", "clipped")])
def test_ranges_by_the_name_of_their_paper(paper, ranges):
    assert plan(net(), ranges=paper).to_dict() == plan(net(), ranges=ranges).to_dict()


# What stays in float


def test_operators_without_a_row_are_named():
    planned = plan(nn.Sequential(conv(3), Function(lambda x: torch.erf(torch.sin(x))), conv()))
    assert places(planned) == [("input",), ("1.erf",)]
    assert reason_of(planned, "1.sin") == "no row of the operator table says how it treats scales"


def test_notes_name_what_stayed_python():
    import halfeven as he

    model = nn.Sequential(conv(3), nn.ReLU(), conv())
    planned = he.plan_of(he.prepare(model, torch.randn(IMAGE), leave_out=("2",)))
    assert [w.name for w in planned.weights] == ["0:conv2d"]
    assert any("2: left out at your request" in note for note in planned.notes)
    assert "left out at your request" in str(planned)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(PlacementError, match="No layer of this model would be quantized"):
        plan(nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    with pytest.raises(PlacementError, match="the rules leave all of them in float"):
        plan(nn.Sequential(conv(3)), rules=(Rule(quantize=False),))


# Rules


def net():
    return nn.Sequential(
        conv(3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def bits(planned):
    return {w.name: w.scheme.bits for w in planned.weights}


def test_a_rule_by_pattern():
    planned = plan(net(), rules=(Rule(pattern="2", weight_bits=4, activation_bits=6),))
    assert bits(planned) == {"0": 8, "2": 4, "4": 8, "7": 8}
    assert {t.places[0]: t.scheme.bits for t in planned.tensors}["3.relu"] == 6  # the output of layer 2, after its ReLU
    assert {t.scheme.bits for t in planned.tensors if t.places[0] != "3.relu"} == {8}


@pytest.mark.parametrize("rule", [Rule(pattern="1*", activation_bits=6), Rule(pattern="2.relu", activation_bits=6),
                                  Rule(kind="activation", activation_bits=6)])  # fmt: skip
def test_a_rule_may_name_what_is_fused_behind_the_operator_as_the_plan_does(rule):
    planned = plan(nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU(), conv()), rules=(rule,))
    assert activation_bits(planned) == {"input": 8, "2.relu": 6}


def test_the_last_rule_wins_among_those_of_a_fused_group():
    rules = (Rule(pattern="1.relu", activation_bits=6), Rule(kind="convolution", activation_bits=5))
    model = nn.Sequential(conv(3), nn.ReLU(), conv())
    assert activation_bits(plan(model, rules=rules))["1.relu"] == 5
    assert activation_bits(plan(model, rules=rules[::-1]))["1.relu"] == 6


@pytest.mark.parametrize("branch", ["one", "two"])
def test_a_rule_for_one_of_what_is_concatenated_holds_for_all(branch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = conv(3), conv(3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.last(torch.cat([self.one(x), self.two(x)], 1))

    planned = plan(Net(), rules=(Rule(pattern=branch, activation_bits=6),))
    assert activation_bits(planned) == {"x": 8, "one": 6}


def test_a_rule_by_kind():
    planned = plan(net(), scheme="w4a8", rules=(Rule(kind="linear", weight_bits=8),))
    assert bits(planned) == {"0": 4, "2": 4, "4": 4, "7": 8}


def test_the_last_rule_wins_field_by_field():
    rules = (
        Rule(kind="convolution", weight_bits=4, activation_bits=7),
        Rule(pattern="2", weight_bits=6),
        Rule(pattern="0", quantize=False),
        Rule(pattern="?", weight_bits=5),
    )
    planned = plan(net(), rules=rules)
    assert bits(planned) == {"2": 5, "4": 5, "7": 5}
    assert {t.places[0]: t.scheme.bits for t in planned.tensors}["3.relu"] == 7


def test_a_rule_for_float_and_back():
    rules = (Rule(kind="convolution", quantize=False), Rule(pattern="4", quantize=True))
    assert bits(plan(net(), rules=rules)) == {"4": 8, "7": 8}


def test_a_layer_in_float_asks_for_no_integers():
    planned = plan(net(), rules=(Rule(pattern="2", quantize=False),))
    assert "2" not in bits(planned)
    assert places(planned) == [("input",), ("3.relu",), ("4",), ("5.adaptive_avg_pool2d",)]
    assert reason_of(planned, "2") == "a rule says so"


def test_an_inputs_rule():
    planned = plan(net(), rules=(Rule(pattern="input", activation_bits=7),))
    assert planned.tensors[0].scheme.bits == 7


def test_a_rule_that_held_for_nothing_names_the_nearest():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.classifier = nn.Sequential(conv(3)), nn.Linear(8, 2)

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    with pytest.raises(PlacementError, match=r"clasifier.*would do nothing.*nearest names are classifier"):
        plan(Net(), rules=(Rule(pattern="clasifier", weight_bits=4),))
    with pytest.raises(PlacementError, match=r'names a module: write "features\.\*"'):
        plan(Net(), rules=(Rule(pattern="features", weight_bits=4),))
    with pytest.raises(PlacementError, match="would do nothing"):
        plan(Net(), rules=(Rule(kind="matrix product", weight_bits=4),))
    with pytest.raises(PlacementError, match=r'operator kind "conv", which does not exist.*convolution'):
        plan(Net(), rules=(Rule(kind="conv"),))


@pytest.mark.parametrize(("rule", "lacks"), [
    (Rule(pattern="7", activation_bits=6), r'matches "7", which has no quantizer at its output'),
    (Rule(pattern="3.relu", weight_bits=6), r'matches "3.relu", which has no quantized weight'),
    (Rule(pattern="0", weight_bits=6), r'matches "0", which has no quantized weight'),
    (Rule(pattern="7"), "sets none of weight_bits, "),
    (Rule(pattern="7", weight_bits=12), "cannot run weights of 12 bits"),
])  # fmt: skip
def test_a_rule_whose_part_nothing_has_is_refused_with_the_reason(rule, lacks):
    with pytest.raises(PlacementError, match=lacks):
        plan(net(), rules=(Rule(pattern="0", quantize=False), rule))


def test_a_rule_of_which_one_part_holds_is_taken():
    planned = plan(net(), rules=(Rule(kind="linear", weight_bits=6, activation_bits=6),))
    assert bits(planned)["7"] == 6
    assert {t.scheme.bits for t in planned.tensors} == {8}


# The first and the last layer


def activation_bits(planned):
    return {t.places[0]: t.scheme.bits for t in planned.tensors}


def test_bits_of_the_first_and_the_last_layer_and_of_what_they_read():
    planned = plan(net(), scheme="w4a4", first_and_last_bits=8)
    assert bits(planned) == {"0": 8, "2": 4, "4": 4, "7": 8}
    assert activation_bits(planned) == {
        "input": 8, "1.relu": 4, "3.relu": 4, "4": 4, "5.adaptive_avg_pool2d": 8,
    }  # fmt: skip
    planned = plan(Residual(), scheme="w4a4", first_and_last_bits=6)
    assert bits(planned) == {"stem": 6, "conv1": 4, "conv2": 4, "last": 6}
    assert activation_bits(planned) == {"x": 6, "relu": 4, "relu_1": 4, "relu_2": 6}


def test_what_the_last_layer_reads_is_found_through_pools_activations_and_norms():
    model = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2), conv())
    planned = plan(model, scheme="w4a4", first_and_last_bits=8)
    assert activation_bits(planned) == {"input": 8, "1.relu": 4, "4.silu": 8}


def test_a_single_layer_is_the_first_and_the_last():
    planned = plan(nn.Sequential(conv(3), nn.ReLU()), scheme="w4a4", first_and_last_bits=8)
    assert bits(planned) == {"0": 8}
    assert activation_bits(planned) == {"input": 8}


def test_the_first_and_the_last_layer_of_a_model_that_is_captured_in_parts():
    model = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())
    planned = plan(model, leave_out=("2",), scheme="w4a4", first_and_last_bits=8)
    assert bits(planned) == {"0:conv2d": 8, "4:conv2d": 8}
    assert activation_bits(planned) == {"0:input": 8, "4:input": 8}


def test_rules_come_after_the_bits_of_the_first_and_the_last_layer():
    rules = (
        Rule(pattern="0", weight_bits=5),
        Rule(pattern="input", activation_bits=7),
        Rule(kind="linear", weight_bits=3),
    )
    planned = plan(net(), scheme="w4a4", first_and_last_bits=8, rules=rules)
    assert bits(planned) == {"0": 5, "2": 4, "4": 4, "7": 3}
    assert activation_bits(planned)["input"] == 7
    assert activation_bits(planned)["5.adaptive_avg_pool2d"] == 8


def test_all_layers_have_the_schemes_bits_where_nothing_is_said_of_the_ends():
    planned = plan(net(), scheme="w4a5")
    assert set(bits(planned).values()) == {4}
    assert set(activation_bits(planned).values()) == {5}


# Schemes and targets


@pytest.mark.parametrize("scheme", ["w8a12", "w9a8", "w16a8", "w8a9"])
def test_widths_that_the_target_cannot_run(scheme):
    with pytest.raises(PlacementError, match=r"openvino cannot run .* bits in integers \(it can from 2 to 8\)"):
        plan(net(), scheme=scheme)


def test_a_rules_widths_are_checked_too():
    with pytest.raises(PlacementError, match="cannot run weights of 9 bits"):
        plan(net(), rules=(Rule(pattern="0", weight_bits=9),))
    with pytest.raises(PlacementError, match="cannot run activations of 4 bits"):
        plan(net(), target="tensorrt", rules=(Rule(pattern="0", activation_bits=4),))


@pytest.mark.parametrize(("target", "scheme", "ends"), [
    ("openvino", "w8a8", 16), ("onnxruntime", "w4a8", 9), ("tensorrt", "w8a8", 4), ("openvino", "w4a16", 6),
    ("onnxruntime", "w8a16", 16),
])  # fmt: skip
def test_the_widths_of_the_first_and_the_last_layer_are_checked_too(target, scheme, ends):
    with pytest.raises(PlacementError, match=rf"{target} cannot run weights of {ends} bits"):
        plan(net(), target=target, scheme=scheme, first_and_last_bits=ends)


def test_the_ends_of_a_scheme_of_weights_alone_may_have_another_width():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    planned = plan(model, (2, 8), scheme="w4a16", first_and_last_bits=8)
    assert list(bits(planned).values()) == [8, 4, 8]


def test_an_unreadable_scheme_is_refused():
    with pytest.raises(ConfigError, match="cannot be read"):
        plan(net(), scheme="int8")


def test_planning_changes_nothing():
    from halfeven.placement.make_plan import make_plan
    from halfeven.placement.plan import QuantizationOptions
    from halfeven.targets.openvino import OPENVINO
    from placement.parts import captured

    model = captured(net())
    before = model.code, list(model.state_dict())
    first, second = (make_plan(model, QuantizationOptions(), OPENVINO) for _ in range(2))
    assert first == second
    assert (model.code, list(model.state_dict())) == before


# Outputs

SCORES = {
    "a linear layer": nn.Sequential(conv(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    "a pool": nn.Sequential(conv(3), nn.ReLU(), conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}
NO_SCORES = {
    "a map": nn.Sequential(conv(3), nn.ReLU(), conv()),
    "an activation": nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Sigmoid()),
    "one number": nn.Sequential(nn.Flatten(), nn.Linear(192, 1)),
    "tokens": nn.Sequential(nn.Flatten(2), nn.Linear(64, 5)),
}


def of_the_output(model, **options):
    """What is planned for the tensor that the model returns."""
    (tensor,) = [t for t in plan(model, quantize_outputs=True, **options).tensors if "the output" in t.consumers]
    return tensor


@pytest.mark.parametrize("observer", ["mse", "lp"])
@pytest.mark.parametrize("name", sorted(SCORES))
def test_the_range_of_scores_is_chosen_by_cross_entropy(name, observer):
    tensor = of_the_output(SCORES[name], activation_observer=observer)
    assert tensor.observer == "cross_entropy"
    assert tensor.consumers == ("the output",)
    assert "cross_entropy" in str(plan(SCORES[name], quantize_outputs=True).table())


@pytest.mark.parametrize("name", sorted(NO_SCORES))
def test_other_outputs_have_the_range_of_all_activations(name):
    assert of_the_output(NO_SCORES[name], activation_observer="lp").observer == "lp"


def test_extremes_are_the_extremes_of_the_output_too():
    assert of_the_output(SCORES["a linear layer"], activation_observer="minmax").observer == "minmax"


def test_outputs_stay_in_float_unless_asked_for():
    assert not any("the output" in t.consumers for t in plan(SCORES["a linear layer"]).tensors)


def test_every_output_is_quantized_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = conv(3), conv(), conv(8, 5)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return {"features": x, "both": [torch.cat([self.a(x), x], 1), self.b(x)], "size": x.shape[2]}

    planned = plan(Net(), quantize_outputs=True)
    assert places(planned) == [("x",), ("relu", "a"), ("b",)]
    assert planned.tensors[1].consumers == ("a", "b", "the output")
    rule = Rule(pattern="b", quantize=False)
    assert places(plan(Net(), quantize_outputs=True, rules=(rule,))) == [("x",), ("relu", "a")]


def test_outputs_that_python_makes_cannot_be_quantized():
    model = nn.Sequential(conv(3), nn.ReLU(), conv())
    with pytest.raises(PlacementError, match=r"captured in parts \(0\).*quantize_outputs=False"):
        plan(model, quantize_outputs=True, leave_out=("2",))


# What computes, and what does not


class Arithmetic(nn.Module):
    """Work outside of layers, and tensors that are the same for every sample."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.lstm, self.gru = nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = self.first(x).relu()
        y = y * torch.cos(torch.arange(12.0) * 0.1)[:, None] + torch.zeros(x.shape[0], 12, 16)
        y = y + self.lstm(y)[0] + self.gru(y)[1].transpose(0, 1) + torch.einsum("bnc,cd->bnd", y, self.weight)
        y = y + F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], is_causal=True)[:, 0]
        y = y @ self.weight + y.max(1, keepdim=True).values
        return self.last(torch.addmm(self.bias, torch.mm(y.mean(1), self.weight), self.weight))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_the_plan_names_all_that_multiplies_and_nothing_that_computes_nothing(target):
    planned = plan(Arithmetic(), (4, 12, 8), target=target)
    named = {left.operator for left in planned.left}
    work = {"lstm", "gru", "einsum", "scaled_dot_product_attention", "mm", "addmm", "matmul"}
    assert work <= named
    assert named.isdisjoint({"cos", "arange", "zeros", "getitem", "full"})
    assert {left.operator for left in planned.left if "two activations" in left.reason} == work


class Queries(nn.Module):
    """Learned queries through layers of their own, or joined to a tensor; one of the layers reads a tensor too."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 8))
        self.alone, self.both, self.joined, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        y = self.both(x) @ (self.alone(self.queries) + self.both(self.queries)).T @ self.queries
        return self.last(y), self.joined(torch.cat([self.queries.expand(x.shape[0], -1, -1), x], 1))


def test_a_layer_on_parameters_stays_in_float_and_the_plan_says_so():
    planned = plan(Queries(), (2, 5, 8))
    assert [weight.name for weight in planned.weights] == ["both", "last"]
    said = {left.name: left.reason for left in planned.left}
    assert all(said[name].startswith("it reads a parameter") for name in ("alone", "joined"))
