"""A quantized model trained in the ways a float one is: compiled, in mixed precision, checkpointed, accumulating."""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import halfeven as he
from halfeven.quantization.model_quantizers import quantizers, weights_quantized_once
from placement.parts import Residual

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(net=Residual):
    torch.manual_seed(0)
    return he.calibrate(he.prepare(net(), X, ranges="learned"), [X]).train()


def gradients(model, run):
    run(model).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, **tolerance)


def test_the_compiled_kernels_of_a_whole_model_give_the_same():
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    plain = prepared(net)
    compiled = copy.deepcopy(plain)
    expected = gradients(plain, lambda model: model(X))
    assert_same_gradients(
        expected, gradients(compiled, lambda model: torch.compile(model, fullgraph=True)(X)), rtol=1e-2, atol=1e-4
    )


def test_activation_checkpointing_gives_the_same_gradients():
    plain = prepared()
    other = copy.deepcopy(plain)
    expected = gradients(plain, lambda model: model(X))
    assert_same_gradients(
        expected, gradients(other, lambda model: checkpoint(model, X, use_reentrant=False)), rtol=0, atol=0
    )


def test_bfloat16_multiplies_the_integers_exactly():
    """The outputs of a layer differ from float32's by the rounding of its result alone."""
    layer = he.calibrate(he.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), X, ranges="learned"), [X]).train()
    expected = layer(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(X)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=1e-3)
    found.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in layer.parameters() if p.numel() > 1)


def test_weights_are_quantized_once_while_gradients_accumulate():
    plain = prepared()
    other = copy.deepcopy(plain)
    for _ in range(2):
        expected = gradients(plain, lambda model: model(X))
    calls = []
    weights = [q for q in quantizers(other).values() if q.weight]
    with weights_quantized_once(other):
        for _ in range(2):
            found = gradients(other, lambda model: model(X))
            calls.append([q.cached.data_ptr() for q in weights])
    assert_same_gradients(expected, found, rtol=0, atol=0)
    assert calls[0] == calls[1]
    assert all(q.cached is None for q in weights)


def test_after_a_step_weights_are_quantized_anew():
    model = prepared()
    with weights_quantized_once(model):
        before = model(X)
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)
    assert not torch.equal(model(X), before)


def test_channels_last_stays_channels_last():
    layer = he.calibrate(he.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), X), [X]).train()
    x = X.to(memory_format=torch.channels_last)
    layer = layer.to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(X), rtol=1e-4, atol=1e-5)
