"""Ranges for the mode that training uses, and warnings where training clips."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import HalfevenWarning
from halfeven.layerwise.clipping import ClippingWatch, counting_clipped
from halfeven.layerwise.re_estimate import re_estimate


def block(inputs, outputs, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs, momentum=0.01), nn.ReLU())


def deep(norm=nn.BatchNorm2d):
    return nn.Sequential(
        block(3, 12), *(block(12, 12, norm) for _ in range(5)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    )


CLASSES = torch.arange(16) % 4


def batches(count=3):
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [(torch.randn(16, 3, 8, 8) * 0.3 + 0.8 * patterns[CLASSES], CLASSES) for _ in range(count)]


def learn(model, data, steps):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        images, labels = data[step % len(data)]
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("batchnorm", "ranges"), [("keep", "learned"), ("fold live", "observed")])
def test_unsettled_batchnorm_is_named_and_training_learns(batchnorm, ranges):
    data = batches()
    model = deep()
    learn(model, data, 6)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    qmodel = he.prepare(model.eval(), data[0][0], batchnorm=batchnorm, ranges=ranges)
    with pytest.warns(HalfevenWarning, match=r"(?s)statistics do not describe.*5.2.relu \("):
        he.calibrate(qmodel, iter(data))
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in qmodel.named_buffers() if name in statistics)
    with counting_clipped(qmodel.train()) as counts, torch.no_grad():
        qmodel(data[0][0])
    assert max(counts.shares().values()) < 0.05
    with torch.no_grad():
        float_loss = float(F.cross_entropy(model.train()(data[0][0]), CLASSES))
    assert learn(qmodel, data, 9)[-1] < float_loss


def silent(action):
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfevenWarning)
        return action()


def test_settled_frozen_and_untrained_models_are_calibrated_in_eval_mode_without_a_word():
    data = batches()
    settled = deep()
    learn(settled, data, 6)
    frozen = he.prepare(settled, data[0][0]).train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert silent(lambda: he.calibrate(frozen, data)) is frozen
    silent(lambda: he.calibrate(he.prepare(settled, data[0][0]).requires_grad_(False), data))
    silent(lambda: he.calibrate(he.prepare(deep(), data[0][0]), data))
    silent(lambda: he.quantize(settled, data))
    re_estimate(settled, data)
    silent(lambda: he.calibrate(he.prepare(settled, data[0][0]), data))
    silent(lambda: he.calibrate(he.prepare(deep(nn.InstanceNorm2d), data[0][0]), data))
    single = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    single.train()(torch.randn(4, 3))
    silent(lambda: he.calibrate(he.prepare(single.eval(), torch.randn(4, 3)), [torch.randn(1, 3)]))


def test_the_watch_names_what_a_step_clips_once():
    qmodel = he.prepare(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3))
    he.calibrate(qmodel, [torch.randn(8, 3) * 0.1])
    watch = ClippingWatch(qmodel)

    def step():
        watch.before_step()
        qmodel(torch.randn(8, 3))
        watch.after_step()

    with pytest.warns(HalfevenWarning, match=r"1 of 2 quantized activations clip more than 20%.*input \("):
        step()
    silent(step)
    watch.due = True
    silent(step)  # it was named before
