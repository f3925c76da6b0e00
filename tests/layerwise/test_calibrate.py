"""Calibration: every range set, nothing else changed."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError
from halfeven.layerwise.calibrate import set_weight_ranges
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode

IMAGE = (4, 3, 6, 6)


def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def prepared(model=None, **options):
    return he.prepare(model or net(), torch.randn(IMAGE), **options)


def batches(count=3):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(IMAGE, generator=generator) * (i + 1) for i in range(count)]


def ranges(qmodel):
    return {name: (q.scale.clone(), q.zero_point.clone()) for name, q in quantizers(qmodel).items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "lp", "entropy"])
@pytest.mark.parametrize("learned", ["observed", "learned"])
def test_sets_every_range(observer, learned):
    qmodel = prepared(activation_observer=observer, ranges=learned)
    assert he.calibrate(qmodel, batches()) is qmodel
    for name, quantizer in quantizers(qmodel).items():
        assert quantizer.state.has_range, name
        assert torch.isfinite(quantizer.scale).all(), name
        assert (quantizer.scale > 0).all(), name
        assert quantizer.mode is Mode.QUANTIZE
        assert quantizer.observer is None
    assert torch.isfinite(qmodel.eval()(batches()[0])).all()


def test_minmax_ranges_are_the_extremes_of_the_model_with_quantized_weights():
    qmodel = prepared(activation_observer="minmax")
    he.calibrate(qmodel, batches())
    source = qmodel.get_submodule("quantizers.input")
    assert source.low == torch.cat(batches()).min()
    assert source.high == torch.cat(batches()).max()
    # The second tensor's range: of the first layer on float inputs with quantized weights.
    layer, norm = qmodel.get_submodule("0"), qmodel.get_submodule("1").eval()
    with torch.no_grad():
        weight = layer.weight_quantizer.eval()(layer.weight)
        seen = torch.cat([norm(torch.nn.functional.conv2d(x, weight, layer.bias)).relu() for x in batches()])
    torch.testing.assert_close(qmodel.get_submodule("quantizers.2_relu").high, seen.max())


@pytest.mark.parametrize("training", [False, True])
def test_changes_nothing_but_ranges(training):
    qmodel = prepared().train(training)
    qmodel.get_submodule("1").train(not training)
    modes = {name: module.training for name, module in qmodel.named_modules()}
    before = copy.deepcopy(qmodel.state_dict())
    he.calibrate(qmodel, batches())
    assert {name: module.training for name, module in qmodel.named_modules()} == modes
    for name, value in qmodel.state_dict().items():
        if "quantizer" not in name:
            assert torch.equal(value, before[name]), name


def test_computes_in_eval_mode():
    """Dropout and batch statistics have no part in the ranges: twice gives the same."""
    qmodel = prepared().train()
    he.calibrate(qmodel, batches())
    once = ranges(qmodel)
    he.calibrate(qmodel, batches())
    assert_equal(ranges(qmodel), once)


def test_calibrating_again_forgets_the_first_time():
    qmodel = prepared()
    he.calibrate(qmodel, [x * 100 for x in batches()])
    with torch.no_grad():
        qmodel.get_submodule("0").weight.mul_(3)
    he.calibrate(qmodel, batches())
    fresh = prepared()
    fresh.load_state_dict({k: v for k, v in qmodel.state_dict().items()})
    he.calibrate(fresh, batches())
    assert_equal(ranges(qmodel), ranges(fresh))
    assert qmodel.get_submodule("quantizers.input").high < 20


def test_the_order_of_batches_does_not_matter():
    one, other = prepared(net_ := net()), prepared(net_)
    he.calibrate(one, batches())
    he.calibrate(other, batches()[::-1])
    assert_equal(ranges(one), ranges(other))


def test_batches_says_how_many():
    drawn = []

    def loader():
        for x in batches(5):
            drawn.append(1)
            yield x

    model = net()
    one, other = prepared(model), prepared(model)
    he.calibrate(one, loader(), batches=2)
    assert len(drawn) <= 3
    he.calibrate(other, batches(5)[:2])
    assert_equal(ranges(one), ranges(other))


def test_forms_of_batches():
    model = net()
    results = []
    for form in (lambda x: x, lambda x: (x, torch.zeros(4)), lambda x: [x, "names", 3]):
        qmodel = prepared(model)
        he.calibrate(qmodel, [form(x) for x in batches()])
        results.append(ranges(qmodel))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_dicts_of_inputs():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, mask):
            return self.fc(x * mask)

    example = {"x": torch.randn(2, 3), "mask": torch.ones(2, 3)}
    qmodel = he.prepare(Keyword(), example)
    he.calibrate(qmodel, [example | {"labels": torch.zeros(2)}])
    assert qmodel(**example).shape == (2, 2)


@pytest.mark.parametrize("empty", [[], iter(())])
def test_no_batch_is_an_error(empty):
    with pytest.raises(CalibrationError, match="got no batch"):
        he.calibrate(prepared(), empty)
    with pytest.raises(CalibrationError, match="got no batch"):
        he.calibrate(prepared(), batches(), batches=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_data_names_the_tensor_and_keeps_the_old_ranges(bad):
    qmodel = prepared()
    he.calibrate(qmodel, batches())
    before = copy.deepcopy(qmodel.state_dict())
    spoiled = batches()
    spoiled[1][2, 1, 3, 3] = bad
    with pytest.raises(CalibrationError, match=r"for input: a batch holds NaN or infinite values"):
        he.calibrate(qmodel, spoiled)
    for name, value in qmodel.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(q.mode is Mode.QUANTIZE for q in quantizers(qmodel).values())
    assert torch.isfinite(qmodel.eval()(batches()[0])).all()


def test_a_value_that_grows_infinite_inside_names_its_tensor():
    qmodel = prepared()
    with torch.no_grad():
        qmodel.get_submodule("4").bias[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"5\.relu.*NaN or infinite"):
        he.calibrate(qmodel, batches())


def test_a_weight_of_nan_names_its_layer():
    qmodel = prepared()
    with torch.no_grad():
        qmodel.get_submodule("4").weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="the weight of 4"):
        he.calibrate(qmodel, batches())


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_weights_keep_their_ranges_where_new_ones_cannot_be_set(ranges):
    qmodel = he.calibrate(prepared(ranges=ranges), batches()).eval()
    expected = qmodel(batches()[0])
    states = {name: q.state for name, q in quantizers(qmodel).items()}
    layer = next(module for module in qmodel.modules() if isinstance(module, nn.Conv2d))
    good = layer.weight.detach().clone()
    layer.weight.data[0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        set_weight_ranges(qmodel)
    layer.weight.data.copy_(good)
    assert {name: q.state for name, q in quantizers(qmodel).items()} == states
    assert all(q.observer is None and q.mode is Mode.QUANTIZE for q in quantizers(qmodel).values())
    assert torch.equal(qmodel(batches()[0]), expected)


def test_a_failure_of_the_first_time_leaves_no_ranges():
    qmodel = prepared()
    with pytest.raises(CalibrationError):
        he.calibrate(qmodel, [])
    with pytest.raises(CalibrationError, match="no range yet"):
        qmodel.eval()(batches()[0])


def test_dead_channels_get_a_sane_scale():
    model = net()
    with torch.no_grad():
        model[0].weight[2] = 0
    qmodel = prepared(model, ranges="learned")
    he.calibrate(qmodel, batches())
    scale = qmodel.get_submodule("0.weight_quantizer").scale
    assert scale[2] == scale.max()
    assert torch.isfinite(qmodel.eval()(batches()[0])).all()


def test_nothing_is_left_for_autograd():
    qmodel = prepared(ranges="learned")
    he.calibrate(qmodel, batches())
    assert all(parameter.grad is None for parameter in qmodel.parameters())
    assert all(parameter.requires_grad for parameter in qmodel.parameters())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a3"])
def test_the_range_of_class_scores_is_that_of_the_least_cross_entropy(scheme):
    """The model's own logits, through the quantizer: no other range of a grid of candidates serves them better."""
    qmodel = prepared(quantize_outputs=True, scheme=scheme, ranges="observed")
    he.calibrate(qmodel, batches())
    qmodel.eval()
    last = list(quantizers(qmodel).values())[-1]
    assert last.observer_name == "cross_entropy"

    def loss():
        return sum(torch.nn.functional.cross_entropy(last(x), x.softmax(-1)).item() for x in logits)

    logits = []
    with torch.no_grad():
        handle = last.register_forward_pre_hook(lambda _, inputs: logits.append(inputs[0]))
        for batch in batches():
            qmodel(batch)
        handle.remove()
        found, low, high = loss(), last.low.clone(), last.high.clone()
        for a in (0.7, 0.85, 1.0, 1.2):
            for b in (0.7, 0.85, 1.0, 1.2):
                last.set_range(low * a, high * b)
                assert found <= loss() + 1e-3
