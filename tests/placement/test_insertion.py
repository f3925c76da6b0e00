"""Quantizers in the graph: once each, where the plan says, and an ordinary module remains."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import PlacementError
from halfeven.placement.insertion import insert, plan_of, quantizer_of
from halfeven.placement.make_plan import make_plan
from halfeven.placement.plan import QuantizationOptions, Rule
from halfeven.placement.quantized_layers import QUANTIZED_LAYERS
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.model_quantizers import quantizers, set_mode, set_observing
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.targets.openvino import OPENVINO
from placement.parts import IMAGE, Attention, Residual, captured, conv, plan


def prepared(model, shape=IMAGE, **options):
    return he.prepare(model, torch.randn(shape), **options)


def test_quantizers_are_those_of_the_plan():
    qmodel = prepared(Residual())
    names = set(quantizers(qmodel))
    assert names == {
        *("quantizers.x", "quantizers.relu", "quantizers.relu_1", "quantizers.relu_2"),
        *("stem.weight_quantizer", "conv1.weight_quantizer", "conv2.weight_quantizer", "last.weight_quantizer"),
    }
    planned = plan_of(qmodel)
    for tensor in planned.tensors:
        assert qmodel.get_submodule(f"quantizers.{tensor.name}").scheme == tensor.scheme
    for weight in planned.weights:
        quantizer = qmodel.get_submodule(f"{weight.name}.weight_quantizer")
        assert quantizer.scheme == weight.scheme
        assert quantizer.weight
        assert quantizer.scale.shape == (weight.channels,)


class Numbered(nn.Module):
    """Layers "blocks.1" and "blocks_1", of very different ranges."""

    def __init__(self):
        super().__init__()
        self.blocks, self.blocks_1, self.last = nn.Sequential(conv(3), conv()), conv(), conv(8, 4)
        self.blocks_1.weight.data *= 100

    def forward(self, x):
        return self.last(self.blocks_1(self.blocks(x)))


def test_tensors_whose_names_differ_in_a_dot_have_quantizers_of_their_own():
    qmodel = he.calibrate(prepared(Numbered()), [torch.randn(IMAGE)])
    names = {tensor.places[0]: tensor.name for tensor in plan_of(qmodel).tensors}
    assert len({*names.values()}) == len(names)
    scales = {place: qmodel.get_submodule(f"quantizers.{name}").scale for place, name in names.items()}
    assert scales["blocks_1"] > 10 * scales["blocks.1"]
    assert "blocks_1" in he.set_rules(qmodel, Rule(pattern="blocks_1", activation_bits=4))
    assert qmodel.get_submodule(f"quantizers.{names['blocks_1']}").scheme.bits == 4
    assert qmodel.get_submodule(f"quantizers.{names['blocks.1']}").scheme.bits == 8


def test_each_quantizer_stands_after_its_tensor_and_all_read_it():
    qmodel = prepared(Residual())
    nodes = {node.target: node for node in qmodel.graph.nodes if node.op == "call_module"}
    quantized = nodes["quantizers.relu"]
    source = quantized.args[0]
    assert source.target is torch.ops.aten.relu.default
    assert list(source.users) == [quantized]
    assert {str(user.target) for user in quantized.users} == {"conv1", "aten.add.Tensor"}
    assert nodes["quantizers.relu_2"].args[0].target is torch.ops.aten.relu.default


def test_without_quantization_it_is_the_float_model():
    model = Residual().eval()
    qmodel = prepared(model)
    set_mode(qmodel, Mode.FLOAT)
    x = torch.randn(IMAGE)
    assert torch.equal(qmodel.eval()(x), model(x))


def test_keeps_the_float_models_names_and_parameters():
    model = Residual()
    qmodel = prepared(model)
    assert set(model.state_dict()) <= set(qmodel.state_dict())
    added = set(qmodel.state_dict()) - set(model.state_dict())
    assert all(".weight_quantizer." in name or name.startswith("quantizers.") for name in added)
    assert isinstance(qmodel.conv1, nn.Conv2d)
    assert [n for n, _ in qmodel.named_parameters()] == [n for n, _ in model.named_parameters()]
    learned = prepared(model, ranges="learned", scheme="w8a4")
    scales = {n for n, _ in learned.named_parameters()} - {n for n, _ in model.named_parameters()}
    assert scales == {f"{name}.scale" for name in quantizers(learned)}


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, groups=3, dilation=2), IMAGE),
    "same padding": (lambda: nn.Conv2d(3, 4, 3, padding="same"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), (2, 3, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2), (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2), (2, 2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_quantized_layer_is_the_layer_with_its_weight_on_the_grid(name):
    build, shape = LAYERS[name]
    layer = build().eval()
    # OpenVINO has no integer kernel for a transposed one in groups.
    qmodel = prepared(nn.Sequential(layer), shape, target="tensorrt")
    he.calibrate(qmodel, [torch.randn(shape)])
    qmodel.eval()
    x = torch.randn(shape)
    quantizer = qmodel.get_submodule("0.weight_quantizer")
    other = copy.deepcopy(layer)
    with torch.no_grad():
        scale, zero = quantizer.scale, quantizer.zero_point
        other.weight.copy_(fake_quantize(layer.weight, scale, zero, quantizer.scheme))
    source = qmodel.get_submodule("quantizers.input")
    assert torch.equal(qmodel(x), other(source(x)))
    assert type(qmodel.get_submodule("0")) in QUANTIZED_LAYERS.values()
    assert not torch.equal(other.weight, layer.weight)


def test_options_of_learned_ranges_reach_the_quantizers():
    options = {"scale_domain": "log", "learn_zero_points": True, "scheme": "w4a4"}
    qmodel = prepared(nn.Sequential(conv(3), nn.SiLU(), conv(), nn.ReLU(), conv()), ranges="clipped", **options)
    found = quantizers(qmodel)
    assert {name: q.ranges for name, q in found.items()} == {
        name: "learned" if q.weight else "clipped" for name, q in found.items()
    }
    assert {q.domain for q in found.values()} == {"log"}
    learned = {name for name, _ in qmodel.named_parameters() if name.endswith(".zero_point")}
    assert learned == {"quantizers.input.zero_point", "quantizers.1_silu.zero_point"}  # after ReLU it is 0
    he.calibrate(qmodel, [torch.randn(IMAGE)])
    for quantizer in found.values():
        torch.testing.assert_close(quantizer.used_scale(torch.empty(0)), torch.exp2(quantizer.scale.detach()))
    qmodel.train()(torch.randn(IMAGE) * 3).square().sum().backward()
    assert all(bool(p.grad != 0) for name, p in qmodel.named_parameters() if name in learned)


def test_calibrated_ranges_stay_in_training():
    qmodel = prepared(Residual(), ranges="calibrated")
    he.calibrate(qmodel, [torch.randn(IMAGE)])
    state = copy.deepcopy(qmodel.state_dict())
    set_observing(qmodel, True)
    qmodel.train()(torch.randn(IMAGE) * 9)
    after = qmodel.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items() if "quantizer" in name)
    assert not [name for name, _ in qmodel.named_parameters() if "quantizer" in name]


def test_training_moves_weights_and_learned_scales():
    qmodel = prepared(Residual(), ranges="learned")
    he.calibrate(qmodel, [torch.randn(IMAGE)])
    qmodel.train()
    qmodel(torch.randn(IMAGE)).square().mean().backward()
    for name, parameter in qmodel.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith(".scale"), name


def test_a_concats_quantizer_is_one_module_at_all_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3), conv(3, 4), conv(12)

        def forward(self, x):
            return self.c(torch.cat([F.relu(self.a(x)), self.b(x)], 1))

    qmodel = prepared(Net())
    calls = [node.target for node in qmodel.graph.nodes if node.op == "call_module"]
    assert calls.count("quantizers.relu") == 2
    x = torch.randn(IMAGE)
    he.calibrate(qmodel, [x], batches=1)
    both = torch.cat([F.relu(qmodel.get_submodule("a")(x)), qmodel.get_submodule("b")(x)], 1)
    quantizer = qmodel.get_submodule("quantizers.relu")
    # The range is that of both: of the min-max kind no wider, of the MSE kind about as wide.
    assert quantizer.low.item() == pytest.approx(both.min().item(), rel=0.25)
    assert quantizer.high.item() == pytest.approx(both.max().item(), rel=0.25)


def test_layers_know_the_quantizer_of_their_input_through_what_keeps_the_scale():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), conv())
    qmodel = prepared(model)
    (source,) = qmodel.get_submodule("4").input_quantizers
    assert source is qmodel.get_submodule("quantizers.1_relu")
    names = [name for name, _ in qmodel.get_submodule("4").named_modules()]
    assert names == ["", "weight_quantizer"]
    other = copy.deepcopy(qmodel)
    (copied,) = other.get_submodule("4").input_quantizers
    assert copied is other.get_submodule("quantizers.1_relu")


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integers_stay_exact_under_half_precision(dtype):
    """The products are of integers, which half precision holds; rounding is left to the accumulator and the result."""
    model = nn.Sequential(conv(16, 16, bias=False), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
    qmodel = prepared(model, (2, 16, 6, 6))
    x = torch.randn(2, 16, 6, 6)
    he.calibrate(qmodel, [x]).eval()
    layer, source = qmodel.get_submodule("0"), qmodel.get_submodule("quantizers.input")
    exact = layer(source(x))
    with torch.autocast("cpu", dtype):
        half = layer(source(x))
        usual = F.conv2d(source(x), layer.weight_quantizer(layer.weight), padding=1)
    assert half.dtype is dtype
    # Two roundings of results, none of operands: small against each result, even where a sum cancels.
    bound = 2 * torch.finfo(dtype).eps * exact.abs() / 2 * 1.01 + 1e-6
    assert bool(((half - exact).abs() <= bound).all())
    assert not bool(((usual - exact).abs() <= bound).all())


def test_a_plan_of_another_model_is_an_error():
    planned = plan(Residual())
    with pytest.raises(PlacementError, match=r"made for another model: this model has no .*stem"):
        insert(captured(nn.Sequential(conv(3))), planned, OPENVINO)


def test_a_float_model_has_no_plan():
    with pytest.raises(PlacementError, match=r"Residual has no plan.*halfeven\.prepare"):
        plan_of(Residual())


def test_a_copy_keeps_plan_and_example():
    qmodel = prepared(Residual())
    other = copy.deepcopy(qmodel)
    assert plan_of(other) == plan_of(qmodel)
    assert other.halfeven_example is not None
    assert all(a is not b for a, b in zip(quantizers(other).values(), quantizers(qmodel).values(), strict=True))


def test_a_reused_layer_has_one_weight_quantizer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 3)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    qmodel = prepared(Net())
    assert [n for n in quantizers(qmodel) if "weight" in n] == ["conv.weight_quantizer"]
    assert len(plan_of(qmodel).weights) == 1


def test_a_functional_layers_weight_is_quantized_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(F.conv2d(x, self.kernel).mean((2, 3)))

    qmodel = prepared(Own())
    assert [w.name for w in plan_of(qmodel).weights] == ["conv2d", "fc"]
    he.calibrate(qmodel, [torch.randn(IMAGE)])
    (name,) = [n for n, q in quantizers(qmodel).items() if q.weight and n.startswith("quantizers.")]
    quantizer = qmodel.get_submodule(name)
    assert quantizer.scale.shape == (4,)
    assert set(Own().state_dict()) <= set(qmodel.state_dict())


def test_rules_reach_the_modules():
    qmodel = prepared(Residual(), rules=(Rule(pattern="conv1", weight_bits=4), Rule(pattern="last", quantize=False)))
    assert qmodel.conv1.weight_quantizer.scheme.bits == 4
    assert type(qmodel.last) is nn.Conv2d


def test_the_softmaxs_range_is_set_from_the_start():
    qmodel = prepared(Attention(), (2, 5, 16))
    quantizer = qmodel.get_submodule("quantizers.softmax")
    assert quantizer.state.has_range
    assert quantizer.scale.item() == pytest.approx(1 / 255, rel=1e-4)
    unset = [name for name, q in quantizers(qmodel).items() if not q.state.has_range]
    assert "quantizers.qkv" in unset


def test_insertion_keeps_the_mode_and_names_tensors():
    qmodel = prepared(Residual().train())
    assert qmodel.training
    assert all(q.training for q in quantizers(qmodel).values())
    assert qmodel.get_submodule("quantizers.relu").name == "relu"
    assert qmodel.conv1.weight_quantizer.name == "the weight of conv1"


def test_the_quantizer_whose_grid_a_tensor_lies_on():
    qmodel = prepared(nn.Sequential(conv(3), nn.ReLU(), nn.MaxPool2d(2), conv()))
    calls = {node.target: node for node in qmodel.graph.nodes if node.op == "call_module"}
    assert quantizer_of(calls["3"].args[0]) is qmodel.get_submodule("quantizers.1_relu")
    assert isinstance(quantizer_of(calls["0"].args[0]), Quantizer)
    assert quantizer_of(calls["0"]) is None


def test_inserting_is_deterministic():
    options = QuantizationOptions()
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = captured(Residual())
        models.append(insert(model, make_plan(model, options, OPENVINO), OPENVINO))
    assert models[0].code == models[1].code
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert plan_of(models[0]) == plan_of(models[1])
    assert plan_of(models[0]).to_dict() == plan_of(models[1]).to_dict()
