"""Which ranges learn in training, where the options leave it open."""

import pytest
import torch

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.placement.ranges import ranges_in_training
from halfeven.quantization.model_quantizers import quantizers
from placement.parts import IMAGE, Residual


@pytest.mark.parametrize("scheme", ["w4a8", "w8a4", "w3a3", "w2a4"])
def test_all_learn_in_a_scheme_of_few_bits(scheme):
    plan = he.plan(Residual(), torch.randn(IMAGE), scheme=scheme)
    assert {weight.ranges for weight in plan.weights} == {"learned"}
    assert {tensor.ranges for tensor in plan.tensors} <= {"learned", "calibrated"}  # an input of 8 bits stays
    assert "learned ranges" in str(plan)


@pytest.mark.parametrize("scheme", ["w8a8", "w7a8", "w5a5"])
def test_none_learns_in_a_scheme_of_many_bits(scheme):
    plan = he.plan(Residual(), torch.randn(IMAGE), scheme=scheme)
    assert {each.ranges for each in (*plan.weights, *plan.tensors)} == {"observed"}
    assert plan == he.plan(Residual(), torch.randn(IMAGE), scheme=scheme)


def test_a_rule_of_few_bits_lets_that_layer_learn():
    torch.manual_seed(0)
    model, data = Residual().eval(), [torch.randn(IMAGE)]
    qmodel = he.calibrate(he.prepare(model, data[0]), data)
    layer = he.plan_of(qmodel).weights[0].name
    he.set_rules(qmodel, he.Rule(pattern=layer, weight_bits=4))
    plan = he.plan_of(qmodel)
    assert {weight.name for weight in plan.weights if weight.ranges == "learned"} == {layer}
    assert "observed and learned ranges" in str(plan)
    assert sum(quantizer.learned for quantizer in quantizers(qmodel).values()) == 1


def test_post_training_quantization_learns_none():
    data = [torch.randn(IMAGE)]
    qmodel = he.quantize(Residual().eval(), data, scheme="w4a8", reconstruct="off")
    assert not any(quantizer.learned for quantizer in quantizers(qmodel).values())


def test_what_the_options_say_holds():
    for ranges in ("observed", "learned", "clipped", "calibrated"):
        assert ranges_in_training(he.QuantizationOptions(scheme="w4a4", ranges=ranges), 4) == ranges


def test_the_factor_of_the_scales_gradients_can_be_left_out():
    x = torch.randn(IMAGE)
    gradients = {}
    for factor in ("lsq", "off"):
        torch.manual_seed(0)
        qmodel = he.calibrate(he.prepare(Residual().eval(), x, ranges="learned", gradient_scale=factor), [x])
        qmodel(x).square().sum().backward()
        gradients[factor] = {name: q.scale.grad for name, q in quantizers(qmodel).items() if q.learned and q.weight}
    for name, scaled in gradients["lsq"].items():
        weight = dict(qmodel.named_modules())[name.rpartition(".")[0]].weight
        quantizer = quantizers(qmodel)[name]
        count = weight[0].numel() * quantizer.scheme.quant_max
        torch.testing.assert_close(gradients["off"][name] * count**-0.5, scaled)
    with pytest.raises(ConfigError, match="none has a gradient"):
        he.QuantizationOptions(ranges="observed", gradient_scale="off")
