"""prepare, quantize, save and load, as a user calls them."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CheckpointError, ConfigError, PlacementError
from halfeven.quantizer import quantizers


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )
    layers[1].running_mean.normal_()
    layers[1].running_var.uniform_(0.5, 2)
    return layers.eval()


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_the_float_model_is_not_touched(net):
    before, parameters = copy.deepcopy(net.state_dict()), {id(p) for p in net.parameters()}
    qmodel = he.quantize(net, [X])
    torch.optim.SGD(qmodel.parameters(), 0.1)
    qmodel.train()(X).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not parameters & {id(p) for p in qmodel.parameters()}
    assert all(p.grad is None for p in net.parameters())


def test_the_quantized_model_has_the_float_models_keys(net):
    qmodel = he.quantize(net, [X])
    assert set(net.state_dict()) <= set(qmodel.state_dict())


def test_eight_bits_change_little_and_two_much(net):
    expected = net(X).detach()
    error = {
        s: float((he.quantize(net, [X], scheme=s)(X).detach() - expected).norm() / expected.norm())
        for s in ("w8a8", "w2a8")
    }
    assert 0 < error["w8a8"] < 0.02 < 0.1 < error["w2a8"]


def test_folding_before_takes_batchnorm_out(net):
    kept, folded = he.quantize(net, [X]), he.quantize(net, [X], batchnorm="fold")
    assert any(isinstance(m, nn.BatchNorm2d) for m in kept.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(kept(X), folded(X), atol=0.05, rtol=0.05)


def test_training_moves_weights_and_learned_scales(net):
    qmodel = he.calibrate(he.prepare(net, X, ranges="learned"), [X]).train()
    before = copy.deepcopy(qmodel.state_dict())
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.05)
    nn.functional.cross_entropy(qmodel(X), torch.arange(8) % 4).backward()
    optimizer.step()
    moved = [k for k, v in qmodel.state_dict().items() if not torch.equal(v, before[k])]
    assert {
        "0.weight",
        "4.weight",
        "0.weight_quantizer.scale",
        "4.weight_quantizer.scale",
        "quantizers.input.scale",
    } <= set(moved)
    assert not [k for k in moved if k.endswith("zero_point")]


def test_save_and_load_give_the_same_model(net, tmp_path):
    qmodel = he.quantize(net, [X], scheme="w4a8", ranges="learned")
    he.save(qmodel, tmp_path / "q.safetensors")
    again = he.load(tmp_path / "q.safetensors", copy.deepcopy(net), X)
    assert torch.equal(again(X), qmodel(X))
    assert str(he.plan_of(again)) == str(he.plan_of(qmodel))


def test_loading_into_another_model_says_what_differs(net, tmp_path):
    he.save(he.quantize(net, [X]), tmp_path / "q.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 9, 3, bias=False), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(), nn.Linear(324, 4))
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        he.load(tmp_path / "q.safetensors", other, X)


def test_a_plain_model_has_no_plan(net):
    with pytest.raises(PlacementError, match="has no plan"):
        he.plan_of(net)


def test_an_unknown_option_names_the_nearest(net):
    with pytest.raises(ConfigError, match="Did you mean scheme"):
        he.prepare(net, X, schem="w4a8")


def test_a_gamma_of_zero_trains_and_deploys(net, tmp_path):
    net[1].weight.data[:4] = 0
    qmodel = he.quantize(net, [X]).train()
    nn.functional.cross_entropy(qmodel(X), torch.arange(8) % 4).backward()
    assert all(torch.isfinite(p.grad).all() for p in qmodel.parameters())
    qmodel.eval()
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "m.xml"), [X])
    assert report.integer_match == 1.0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_low_precision_multiplies_integers(net, precision):
    """Integers are exact in 16 bits, real numbers are not: the error must be smaller than the usual form makes."""
    qmodel = he.quantize(net, [X])
    linear = qmodel.get_submodule("4")
    x = quantizers(qmodel)["quantizers.2_relu"](torch.rand(64, 288) * 3)
    expected = linear(x)

    def error():
        with torch.autocast("cpu", precision):
            return float((linear(x).float() - expected).abs().mean())

    integers = error()
    linear.input_quantizers = ()
    assert integers < 0.9 * error()
