"""A plan is made without a model being changed, edited, and set; a quantized model takes further rules."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError, ConfigError, PlacementError
from halfeven.placement.plan import Plan
from halfeven.quantization.model_quantizers import quantizers
from sweeps import crossed, sweep

from .parts import conv

timm = pytest.importorskip("timm")

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block between a stem and a classifier; a matrix of the model's own is a layer that is a function."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3)
        self.norm = nn.BatchNorm2d(8)
        self.body = conv()
        self.head = nn.Linear(8, 5)
        self.own = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x)).mean((2, 3))
        return nn.functional.linear(self.head(x), self.own)


class Parts(nn.Module):
    """Two captured parts with Python between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(conv(3), nn.ReLU(), conv())
        self.second = nn.Sequential(conv(), nn.ReLU(), conv(8, 4))

    def forward(self, x):
        x = self.first(x)
        if float(x.sum()) > 1e9:
            x = -x
        return self.second(x)


def made(net, seed=0):
    torch.manual_seed(seed)
    return net().eval()


@functools.cache
def calibrated_once(net, *rules, **options):
    return he.calibrate(he.prepare(made(net), X, rules=rules, **options).eval(), [X])


def calibrated(net, *rules, **options):
    return copy.deepcopy(calibrated_once(net, *rules, **options))


def assert_alike(found, expected):
    """Both models have the same plan, keys, shapes and, once calibrated, the same outputs bit for bit."""
    assert he.plan_of(found).tensors == he.plan_of(expected).tensors
    assert he.plan_of(found).weights == he.plan_of(expected).weights
    assert he.plan_of(found).left == he.plan_of(expected).left
    mine, wanted = found.state_dict(), expected.state_dict()
    assert {name: value.shape for name, value in mine.items()} == {n: value.shape for n, value in wanted.items()}
    he.calibrate(found, [X])
    with torch.no_grad():
        assert torch.equal(found(X), expected(X))


RULES = {
    "weights": (he.Rule(pattern="body", weight_bits=4),),
    "activations": (he.Rule(pattern="stem", activation_bits=6),),
    "observer": (he.Rule(pattern="body", observer="lp"),),
    "all kinds": (he.Rule(kind="convolution", weight_bits=5, activation_bits=5, observer="minmax"),),
    "in float": (he.Rule(pattern="body", quantize=False),),
    "a function": (he.Rule(kind="linear", weight_bits=6),),
    "a function in float": (he.Rule(pattern="linear", quantize=False),),
    "two": (he.Rule(pattern="*", weight_bits=4), he.Rule(pattern="head", weight_bits=8)),
}


# Plans


def test_a_plan_is_what_prepare_would_do_and_the_model_stays():
    model = made(Net)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = he.plan(model, X, scheme="w4a8")
    assert plan == he.plan_of(he.prepare(model, X, scheme="w4a8"))
    assert not quantizers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(plan).startswith("Plan for openvino, w4a8")


@pytest.fixture(scope="module")
def plan():
    return he.plan(made(Net), X)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_plan_with_rules_is_the_plan_of_options_with_them(plan, rules):
    assert plan.with_rules(*rules) == he.plan(made(Net), X, rules=rules)
    assert plan.options.rules == (), "the plan itself stays"


def test_later_rules_win_and_replace_earlier_ones_that_say_no_more():
    first = he.Rule(pattern="body", weight_bits=4)
    both = he.plan(made(Net), X).with_rules(first).with_rules(he.Rule(pattern="body", weight_bits=6, observer="lp"))
    (weight,) = [weight for weight in both.weights if weight.name == "body"]
    assert (weight.scheme.bits, weight.observer) == (6, "lp")
    assert first not in both.options.rules
    kept = both.with_rules(he.Rule(pattern="body", weight_bits=5))
    assert [weight.observer for weight in kept.weights if weight.name == "body"] == ["lp"]
    assert len(kept.options.rules) == 2


def test_rules_without_effect_are_errors():
    plan = he.plan(made(Net), X)
    with pytest.raises(PlacementError, match="holds for no operator"):
        plan.with_rules(he.Rule(pattern="tail", weight_bits=4))
    with pytest.raises(PlacementError, match="no quantizer"):
        he.plan(nn.Sequential(conv(3), nn.Softmax(1)).eval(), X).with_rules(he.Rule(kind="softmax", observer="lp"))
    with pytest.raises(PlacementError, match="cannot run weights of 12 bits"):
        plan.with_rules(he.Rule(pattern="body", weight_bits=12))
    with pytest.raises(ConfigError, match="observer"):
        he.Rule(observer="mes")


def test_a_model_is_prepared_with_a_plan():
    rules = RULES["two"]
    plan = he.plan(made(Net), X, scheme="w8a6").with_rules(*rules)
    assert_alike(he.prepare(made(Net), X, plan=plan).eval(), calibrated(Net, *rules, scheme="w8a6"))


def test_a_plan_together_with_options_is_an_error():
    plan = he.plan(made(Net), X)
    with pytest.raises(ConfigError, match="together with options"):
        he.prepare(made(Net), X, plan=plan, scheme="w4a4")
    with pytest.raises(ConfigError, match="together with options"):
        he.prepare(made(Net), X, he.QuantizationOptions(), plan=plan)


def test_a_plan_of_another_model_is_an_error():
    with pytest.raises(PlacementError, match=r"another model: this model has no .*body"):
        he.prepare(conv(3).eval(), X, plan=he.plan(made(Net), X))
    wider = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8)).eval()
    narrower = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)).eval()
    with pytest.raises(PlacementError, match=r"another model: it gives the weight of 2 8 scales"):
        he.prepare(narrower, X, plan=he.plan(wider, X))


def test_a_plan_of_a_file_asks_for_its_model():
    plan = Plan.from_dict(he.plan(made(Net), X).to_dict())
    with pytest.raises(PlacementError, match="read from a file"):
        plan.with_rules(RULES["weights"][0])
    prepared = he.plan_of(he.prepare(made(Net), X, plan=plan))
    assert prepared.with_rules(*RULES["weights"]) == he.plan(made(Net), X, rules=RULES["weights"])


# Rules for a model that is quantized already


@pytest.mark.parametrize(("name", "ranges"), crossed(RULES, ["observed", "learned"]))
def test_new_rules_make_the_model_that_prepare_makes_with_them(name, ranges):
    rules = RULES[name]
    qmodel = calibrated(Net, ranges=ranges)
    he.set_rules(qmodel, rules)
    assert_alike(qmodel, calibrated(Net, *rules, ranges=ranges))


@pytest.mark.parametrize("batchnorm", ["fold", "fold live"])
def test_a_layer_goes_to_float_and_back(batchnorm):
    qmodel = calibrated(Net, batchnorm=batchnorm, per_channel=False)
    keys = set(qmodel.state_dict())
    he.set_rules(qmodel, he.Rule(pattern="stem", quantize=False))
    assert type(qmodel.stem) is nn.Conv2d
    he.set_rules(qmodel, he.Rule(pattern="stem", quantize=True))
    assert set(qmodel.state_dict()) == keys
    assert_alike(qmodel, calibrated(Net, batchnorm=batchnorm, per_channel=False))


def test_quantizers_that_change_have_no_range_and_all_others_keep_theirs():
    qmodel = calibrated(Net)
    before = {name: (q, q.scale.clone()) for name, q in quantizers(qmodel).items()}
    named = he.set_rules(qmodel, [he.Rule(pattern="body", weight_bits=4)])
    assert named == ("the weight of body",)
    for name, quantizer in quantizers(qmodel).items():
        if name == "body.weight_quantizer":
            assert quantizer.scheme.bits == 4
        else:
            assert quantizer is before[name][0]
            assert torch.equal(quantizer.scale, before[name][1])
    with pytest.raises(CalibrationError, match="the weight of body has no range yet"):
        qmodel(X)
    he.calibrate(qmodel, [X])
    assert torch.isfinite(qmodel(X)).all()


def test_an_error_leaves_the_model_as_it_was():
    qmodel = calibrated(Net)
    with torch.no_grad():
        expected = qmodel(X)
        with pytest.raises(PlacementError):
            he.set_rules(qmodel, [RULES["weights"][0], he.Rule(pattern="tail", weight_bits=4)])
        assert torch.equal(qmodel(X), expected)
    assert he.plan_of(qmodel).options.rules == ()


def test_before_calibration_too():
    qmodel = he.prepare(made(Net), X).eval()
    he.set_rules(qmodel, RULES["weights"])
    assert_alike(qmodel, calibrated(Net, *RULES["weights"]))


def test_files_hold_the_new_rules(tmp_path):
    qmodel = calibrated(Net)
    he.set_rules(qmodel, RULES["two"])
    he.calibrate(qmodel, [X])
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", made(Net, seed=1), X)
    assert he.plan_of(loaded) == he.plan_of(qmodel)
    with torch.no_grad():
        assert torch.equal(loaded(X), qmodel(X))
    he.set_rules(loaded, RULES["activations"])
    assert [t.scheme.bits for t in he.plan_of(loaded).tensors if "relu" in t.places] == [6]


def test_new_rules_in_a_model_of_several_regions():
    qmodel = calibrated(Parts)
    assert len({weight.name.partition(":")[0] for weight in he.plan_of(qmodel).weights}) == 2
    rules = (he.Rule(pattern="second:2", weight_bits=4), he.Rule(pattern="first:0", quantize=False))
    he.set_rules(qmodel, rules)
    assert_alike(qmodel, calibrated(Parts, *rules))


REAL = {
    "test_resnet.r160_in1k": he.Rule(pattern="layer1.*", weight_bits=4),
    "test_vit.r160_in1k": he.Rule(pattern="blocks.0.*", weight_bits=4, observer="minmax"),
}


@pytest.mark.parametrize("name", sweep(REAL, "test_vit.r160_in1k"))
def test_new_rules_in_models_of_timm(name):
    rule = REAL[name]

    def net():
        kwargs = {"img_size": 32} if "vit" in name else {}
        return timm.create_model(name, pretrained=False, num_classes=10, **kwargs)

    qmodel = calibrated(net)
    he.set_rules(qmodel, rule)
    assert_alike(qmodel, calibrated(net, rule))


def test_a_plan_is_copied_and_pickled():
    plan = he.plan(made(Net), X)
    assert copy.deepcopy(plan).with_rules(he.Rule(pattern="body", weight_bits=4)) != plan
    read = pickle.loads(pickle.dumps(plan))
    assert read == plan
    with pytest.raises(PlacementError, match="has no graph"):
        read.with_rules(he.Rule(pattern="body", weight_bits=4))


def test_a_quantized_model_is_pickled_with_its_plan(tmp_path):
    qmodel = calibrated(Net)
    read = pickle.loads(pickle.dumps(qmodel)).eval()
    assert he.plan_of(read) == he.plan_of(qmodel)
    assert torch.equal(read(X), qmodel(X))
    expected = qmodel.state_dict()
    assert {name: tensor.tolist() for name, tensor in read.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    he.save(read, tmp_path / "q.safetensors")
    assert torch.equal(he.load(tmp_path / "q.safetensors", made(Net), X)(X), qmodel(X))
