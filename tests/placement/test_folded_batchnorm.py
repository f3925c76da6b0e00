"""BatchNorm that is folded anew at every step: the same function as BatchNorm, with quantized folded weights."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.deployment.deployed import deployed_form
from halfeven.quantization.arithmetic import quantize
from halfeven.quantization.model_quantizers import quantizers, set_mode
from halfeven.quantization.quantizer import Mode


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, groups=8, bias=bias), nn.BatchNorm2d(8, affine=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def net(bias=False):
    torch.manual_seed(0)
    model = Net(bias)
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.3, 2)
    nn.init.uniform_(model.bn1.weight, -1.5, 1.5)
    nn.init.normal_(model.bn1.bias)
    return model


X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def prepared(model, **options):
    return he.prepare(model, X, batchnorm="fold live", per_channel=False, ranges="learned", **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_without_quantization_it_is_batchnorm(bias, training):
    model = net(bias)
    qmodel = prepared(model)
    set_mode(qmodel, Mode.FLOAT)
    for one in (model, qmodel):
        one.train(training)
    expected, found = model(X), qmodel(X)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient = qmodel.get_parameter(name).grad
        if training and name.startswith("conv") and name.endswith("bias"):
            continue  # BatchNorm takes it out again: what is left is rounding
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(qmodel.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


def test_a_gamma_of_zero_trains_and_keeps_its_statistics():
    model = net()
    with torch.no_grad():
        model.bn1.weight[2] = 0
    qmodel = he.calibrate(prepared(model), [X]).train()
    before = qmodel.bn1.running_var.clone()
    qmodel(X).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in qmodel.parameters())
    assert qmodel.bn1.running_var[2] == before[2]
    assert bool((qmodel.bn1.running_var != before).sum() == 7)


def test_the_state_dict_has_the_float_models_keys_and_a_checkpoint_loads(tmp_path):
    model = net()
    qmodel = he.calibrate(prepared(model), [X]).eval()
    assert set(model.state_dict()) <= set(qmodel.state_dict())
    he.save(qmodel, tmp_path / "q.safetensors")
    assert torch.equal(he.load(tmp_path / "q.safetensors", net(), X)(X), qmodel(X))


def test_the_quantized_weight_is_the_folded_one():
    model = net()
    qmodel = he.calibrate(prepared(model, scheme="w4a8"), [X]).eval()
    factor = model.bn1.weight / torch.sqrt(model.bn1.running_var + model.bn1.eps)
    folded = model.conv1.weight * factor.reshape(-1, 1, 1, 1)
    quantizer = qmodel.conv1.weight_quantizer
    integers = quantize(folded, quantizer.used_scale(folded), torch.tensor(0), quantizer.scheme)
    seen = []
    hook = quantizer.register_forward_hook(lambda module, args, result: seen.append(result))
    qmodel(X)
    hook.remove()
    assert torch.equal(torch.round(seen[0] / quantizer.used_scale(folded)), integers)


def test_deployed_it_computes_the_same_with_no_batchnorm_left():
    qmodel = he.calibrate(prepared(net(bias=True)), [X]).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        qmodel(X).square().mean().backward()
        optimizer.step()
    qmodel.eval()
    before = copy.deepcopy(qmodel.state_dict())
    model = deployed_form(qmodel)
    torch.testing.assert_close(model(X), qmodel(X), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for name, quantizer in quantizers(qmodel).items():
        if quantizer.weight:
            assert torch.equal(model.get_submodule(name).scale, quantizer.used_scale(torch.empty(0)))
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())


def test_a_copy_is_folded_into_its_own_layers():
    qmodel = he.calibrate(prepared(net()), [X]).eval()
    copied = copy.deepcopy(qmodel)
    with torch.no_grad():
        qmodel.bn1.weight.zero_()
    assert not torch.equal(copied(X), qmodel(X))
    assert copied.conv1.live_norms[0] is copied.bn1
