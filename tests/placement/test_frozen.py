"""Frozen layers keep their scales, and conversions to another type keep them in float32."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.quantization.model_quantizers import quantizers

pytestmark = pytest.mark.usefixtures("unfused")

X = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.neck, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)).relu().mean((2, 3)))


def frozen(*names):
    model = Net().eval()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def trained(qmodel):
    return {name.removesuffix(".scale") for name, p in qmodel.named_parameters() if "scale" in name and p.requires_grad}


@pytest.mark.parametrize("batchnorm", ["keep", "fold", "fold live"])
def test_the_scales_of_a_frozen_backbone_stay(batchnorm):
    options = {"ranges": "learned", "batchnorm": batchnorm}
    every = trained(he.prepare(frozen(), X, **options))
    qmodel = he.calibrate(he.prepare(frozen("backbone"), X, **options), [X]).train()
    inside = {"backbone.0.weight_quantizer", "backbone.3.weight_quantizer", "quantizers.backbone_2_relu"}
    assert inside <= every
    assert trained(qmodel) == every - inside
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    optimizer = torch.optim.SGD([p for p in qmodel.parameters() if p.requires_grad], 0.1)
    qmodel(X).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in qmodel.named_parameters() if not torch.equal(p, before[name])}
    assert not {name for name in moved if name.startswith("backbone.")}
    assert {"neck.weight", "head.weight_quantizer.scale"} <= moved


def test_a_frozen_head_leaves_what_trains_before_it():
    qmodel = he.prepare(frozen("head"), X, ranges="learned")
    assert not qmodel.head.weight_quantizer.scale.requires_grad
    every = trained(he.prepare(frozen(), X, ranges="learned"))
    assert trained(qmodel) == every - {"head.weight_quantizer"}


def test_new_rules_freeze_new_scales_alone():
    qmodel = he.calibrate(he.prepare(frozen("backbone"), X, ranges="learned"), [X])
    qmodel.backbone[0].weight_quantizer.requires_grad_(True)  # the user's choice stays
    he.set_rules(qmodel, [he.Rule(pattern="backbone.3", weight_bits=4), he.Rule(pattern="neck", weight_bits=4)])
    assert qmodel.backbone[0].weight_quantizer.scale.requires_grad
    assert not qmodel.backbone[3].weight_quantizer.scale.requires_grad
    assert qmodel.neck.weight_quantizer.scale.requires_grad


@pytest.mark.parametrize("ranges", ["observed", "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_converted_model_trains_and_is_deployed_with_float32_scales(dtype, ranges, tmp_path):
    qmodel = he.calibrate(he.prepare(frozen(), X, scheme="w7a8", ranges=ranges), [X])
    expected = qmodel.eval()(X)
    scales = {name: q.scale.clone() for name, q in quantizers(qmodel).items()}
    qmodel.to(dtype)
    assert qmodel.neck.weight.dtype == dtype
    for name, quantizer in quantizers(qmodel).items():
        assert quantizer.scale.dtype == torch.float32
        assert torch.equal(quantizer.scale, scales[name])
    found = qmodel(X.to(dtype))
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    qmodel.train()(X.to(dtype)).square().sum().backward()
    torch.optim.SGD(qmodel.parameters(), 1e-3).step()
    qmodel.eval()
    he.export(qmodel, tmp_path / "m.xml")
    report = he.verify(qmodel, tmp_path / "m.xml", [X], timed=False)
    assert report.integer_match == 1
