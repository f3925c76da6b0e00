"""Bias absorption: what always passes an activation moves on, and the report says how nearly the function stays."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError
from halfeven.layerwise.float_equivalence import example_outputs
from halfeven.ptq.equalization.bias_absorption import absorb_biases, absorbable_constant
from halfeven.ptq.equalization.cross_layer import equalize
from nets import IMAGE, NETS, prepared, uneven


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((8, *IMAGE[1:]), generator=generator) for _ in range(3)]


def net(*between, consumer=None, bias=True):
    """A first layer whose channels lie around -2, 0 and 9 with deviation 1, and one that reads it."""
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([-2.0, 0.0, 9.0]))
    return nn.Sequential(nn.Conv2d(3, 3, 1, bias=bias), norm, *between, consumer or nn.Conv2d(3, 4, 1, bias=bias))


def centred(model):
    """The model with BatchNorm statistics of standard normal images, so that what it says of its outputs is so."""
    model.train()
    model[1].momentum = None
    with torch.no_grad():
        model[1](model[0](torch.randn(64, *IMAGE[1:])))
    return model.eval()


def test_the_constant_is_what_an_activation_nearly_always_passes():
    mean, std = torch.tensor([5.0, 2.0, -4.0]), torch.tensor([1.0, 1.0, 0.1])
    torch.testing.assert_close(absorbable_constant(mean, std, 3.0), torch.tensor([2.0, 0.0, 0.0]))
    assert (torch.randn(100_000) * 1.0 + 5.0 > 2.0).float().mean() > 0.998


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_absorbed_without_data(bias):
    qmodel = prepared(centred(net(nn.ReLU(), bias=bias)))
    first, second = qmodel.get_submodule("0"), qmodel.get_submodule("3")
    before, given = example_outputs(qmodel), first.bias.detach().clone()
    report = absorb_biases(qmodel)
    torch.testing.assert_close(given - first.bias, torch.tensor([0.0, 0.0, 6.0]))
    torch.testing.assert_close(first.output_mean, torch.tensor([-2.0, 0.0, 3.0]))
    torch.testing.assert_close(first.output_std, torch.ones(3))
    assert second.bias is not None
    assert he.plan_of(qmodel).changes.given_biases == (() if bias else ("3",))
    assert report.absorbed == {"0 -> 3": pytest.approx(6)}
    assert report.sqnr > 60
    torch.testing.assert_close(example_outputs(qmodel)[0], before[0], rtol=1e-3, atol=1e-3)


def test_fewer_deviations_absorb_more_and_lose_more():
    reports = [absorb_biases(prepared(centred(net(nn.ReLU()))), deviations=d) for d in (3.0, 1.0)]
    assert reports[1].absorbed["0 -> 3"] > reports[0].absorbed["0 -> 3"]
    assert reports[1].sqnr < 40 < reports[0].sqnr


@pytest.mark.parametrize(
    "between", [(nn.ReLU(),), (nn.LeakyReLU(0.2), nn.MaxPool2d(2)), (nn.PReLU(3), nn.AvgPool2d(2))]
)
def test_with_data_the_function_stays_on_the_data(between):
    qmodel = prepared(net(*between).eval())
    expected = [qmodel_float(qmodel, x) for x in batches()]
    report = absorb_biases(qmodel, batches())
    assert report.absorbed[f"0 -> {2 + len(between)}"] > 1
    for x, e in zip(batches(), expected, strict=True):
        torch.testing.assert_close(qmodel_float(qmodel, x), e, rtol=1e-4, atol=1e-4)


def qmodel_float(qmodel, x):
    qmodel.halfeven_example = ((x,), {})
    return example_outputs(qmodel)[0]


def test_with_data_the_constant_is_the_least_value_seen():
    qmodel = prepared(net(nn.ReLU()).eval())
    with torch.no_grad():
        smallest = torch.stack([qmodel.get_submodule("0")._conv_forward(x, *parameters(qmodel)) for x in batches()])
    report = absorb_biases(qmodel, batches())
    assert report.absorbed["0 -> 3"] == pytest.approx(float(smallest.amin((0, 1, 3, 4)).clamp(min=0).max()))
    assert absorb_biases(qmodel, batches()).absorbed["0 -> 3"] == pytest.approx(0, abs=1e-5)


def parameters(qmodel):
    return qmodel.get_submodule("0").weight, qmodel.get_submodule("0").bias


@pytest.mark.parametrize("data", [True, False])
def test_without_an_activation_the_whole_mean_moves_and_nothing_is_lost(data):
    qmodel = prepared(centred(net(nn.Dropout())))
    before = example_outputs(qmodel)
    report = absorb_biases(qmodel, batches() if data else None)
    assert report.absorbed["0 -> 3"] == pytest.approx(9, abs=0.3)
    assert report.sqnr > 110
    torch.testing.assert_close(example_outputs(qmodel)[0], before[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["own", "before", "pool"])
def test_zero_padding_is_inexact_at_the_borders_and_can_be_left_out(padding):
    layers = {
        "own": ((nn.ReLU(),), nn.Conv2d(3, 4, 3, padding=1)),
        "before": ((nn.ReLU(), nn.ZeroPad2d(1)), nn.Conv2d(3, 4, 3)),
        "pool": ((nn.ReLU(), nn.AvgPool2d(3, 1, 1)), nn.Conv2d(3, 4, 1)),
    }
    between, consumer = layers[padding]
    model = centred(net(*between, consumer=consumer))
    qmodel = prepared(model)
    before = example_outputs(qmodel)[0]
    report = absorb_biases(qmodel, across_padding=True)
    difference = (example_outputs(qmodel)[0] - before).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-3 < difference.max()
    assert report.sqnr < 40
    careful = absorb_biases(prepared(model))
    assert careful.absorbed == {}
    assert careful.sqnr == float("inf")
    assert "pads with zeros" in careful.left[0]


def test_layers_that_cannot_take_part_are_named():
    text = str(absorb_biases(prepared(centred(net(nn.ReLU(), consumer=nn.ConvTranspose2d(3, 2, 2, 2))))))
    assert "nothing was changed" in text
    report = absorb_biases(prepared(uneven(NETS["three"][0]())))
    assert report.absorbed == {}
    assert report.left == ("0 (no BatchNorm was folded into it)", "2 (no BatchNorm was folded into it)")
    text = str(absorb_biases(prepared(centred(net(nn.ReLU())))))
    assert "1 of 1 pairs of layers" in text
    assert "0 -> 3: up to 6" in text
    assert "set again" in text


@pytest.mark.parametrize("name", ["depthwise", "grouped", "flattened", "linear", "one dimension", "residual"])
def test_with_data_every_kind_of_link_is_exact_without_padding(name):
    build, shape, _ = NETS[name]
    model = uneven(build())
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias += 20
    qmodel = prepared(model, shape)
    equalize(qmodel)
    x = qmodel.halfeven_example[0][0]
    report = absorb_biases(qmodel, [x])
    assert report.sqnr > 90
    if name not in ("flattened", "one dimension"):
        assert max(report.absorbed.values(), default=0) > 0.1


def test_no_batch_is_an_error_and_changes_nothing():
    qmodel = prepared(centred(net(nn.ReLU())))
    before = qmodel.get_submodule("0").bias.detach().clone()
    with pytest.raises(CalibrationError, match="no batch"):
        absorb_biases(qmodel, [])
    assert torch.equal(qmodel.get_submodule("0").bias, before)
    assert not qmodel.get_submodule("0")._forward_hooks


def test_save_and_load_after_layers_were_given_biases(tmp_path):
    model = centred(net(nn.ReLU(), bias=False))
    qmodel = prepared(model)
    absorb_biases(qmodel)
    he.calibrate(qmodel, batches()).eval()
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", net(nn.ReLU(), bias=False), torch.randn(IMAGE))
    assert torch.equal(loaded(x := torch.randn(IMAGE)), qmodel(x))
    assert not hasattr(loaded.get_submodule("0"), "output_mean")
