"""Equalization across ReLU6 with a bound for each channel: the float function stays, and files compute it."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import PlacementError
from halfeven.layerwise.float_equivalence import example_outputs
from halfeven.layerwise.sqnr import sqnr
from halfeven.placement.channel_clip import channel_clip_at
from halfeven.placement.graph_edits import record_changes
from halfeven.placement.make_plan import named_nodes
from halfeven.ptq.data_free.moment_propagation import propagated
from halfeven.ptq.equalization.cross_layer import equalize
from nets import IMAGE, prepared, uneven


def separable(act=nn.ReLU6) -> nn.Module:
    """Convolution, depthwise convolution and projection with BatchNorm, whose channels differ by up to a thousand."""
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), act(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16),
        act(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ]  # fmt: skip
    return uneven(nn.Sequential(*layers))


PLAIN = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)), IMAGE),
    "linear layers": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Hardtanh(0.0, 2.0), nn.Linear(8, 4)), (2, 3)),
    "both signs": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.Hardtanh(), nn.Conv1d(8, 4, 1)), (2, 3, 8)),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)), IMAGE,
    ),
}  # fmt: skip


def outputs_and_bounds(qmodel):
    clips = [clip for _, node in named_nodes(qmodel).values() if (clip := channel_clip_at(node)) is not None]
    return example_outputs(qmodel)[0], [(clip.low.flatten(), clip.high.flatten()) for clip in clips]


@pytest.mark.parametrize("name", PLAIN)
def test_bounds_follow_their_channels(name):
    build, shape = PLAIN[name]
    qmodel = prepared(uneven(build()), shape)
    before, _ = outputs_and_bounds(qmodel)
    high = getattr(build()[1], "max_val", 6.0)
    layer = qmodel.get_submodule("0")
    bias = layer.bias.detach().clone()
    assert equalize(qmodel, across_clips=True).chains == (("0", "4" if name == "flattened" else "2"),)
    after, [(_, bounds)] = outputs_and_bounds(qmodel)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    torch.testing.assert_close(bounds, high * layer.bias.detach() / bias)
    assert bounds.max() > 3 * bounds.min()
    again = equalize(qmodel, across_clips=True)
    assert again.sweeps == 1


@pytest.mark.parametrize(
    ("act", "target", "ending"),
    [
        (nn.ReLU6, "openvino", "xml"),
        (nn.Hardtanh, "onnxruntime", "onnx"),
        pytest.param(nn.ReLU6, "onnxruntime", "onnx", marks=pytest.mark.exhaustive),
    ],
)
def test_files_clip_by_channel(act, target, ending, tmp_path):
    model, x = separable(act), 3 * torch.randn(16, 3, 8, 8)
    qmodel = prepared(model, scheme="w7a7", per_channel=False, target=target)
    equalize(qmodel, across_clips=True)
    assert len(he.plan_of(qmodel).changes.clipped_by_channel) == 2
    he.calibrate(qmodel, [x]).eval()
    report = he.verify(qmodel, he.export(qmodel, tmp_path / f"m.{ending}"), [x], timed=False)
    assert report.integer_match == report.float_simulation_match == 1
    assert report.integer_layers == report.quantizable_layers == 4
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", model, x[:2])
    assert torch.equal(loaded(x), qmodel(x))
    assert "bounds of each channel: 2.hardtanh, 5.hardtanh" in str(he.plan_of(loaded))


def test_the_pipeline_finds_what_gains():
    model, x, said = separable(), 3 * torch.randn(64, 3, 8, 8), []
    with torch.no_grad():
        expected = model(x)
        kept, found = (
            sqnr([he.quantize(model, [x], per_channel=False, relu6=way, log=said.append)(x)], [expected])
            for way in ("keep", "auto")
        )
    assert found > kept + 5
    assert any("so it is clipped by channel" in line for line in said)


def test_without_data_the_float_function_stays():
    model, x = separable(), torch.randn(IMAGE)
    nn.init.constant_(model[1].bias, 9.0)  # by BatchNorm's statistics most is clipped
    qmodel = he.quantize(model, example=x, per_channel=False, absorb="off")
    assert len(he.plan_of(qmodel).changes.clipped_by_channel) == 2


def test_moments_behind_bounds_by_channel():
    qmodel = prepared(separable())
    reference = copy.deepcopy(qmodel)
    record_changes(qmodel, clipped_by_channel=("2.hardtanh",))
    (clip,) = (found for _, node in named_nodes(qmodel).values() if (found := channel_clip_at(node)) is not None)
    known = {node.name: x for node, x in propagated(qmodel).items()}
    for node, x in propagated(reference).items():
        torch.testing.assert_close(known[node.name].mean, x.mean)
    before = known["hardtanh"]
    lowered = int(before.mean.argmax())
    with torch.no_grad():
        clip.high[lowered] = 1e-3
    moved = {node.name: x for node, x in propagated(qmodel).items()}["hardtanh"]
    assert moved.mean[lowered] <= moved.high[lowered] <= 1.0001e-3 < before.mean[lowered]
    others = torch.arange(16) != lowered
    torch.testing.assert_close(moved.mean[others], before.mean[others])


def test_only_clips_of_channels_get_bounds_of_their_own():
    qmodel = prepared(separable())
    with pytest.raises(PlacementError, match="does not clip the channels of a layer"):
        record_changes(qmodel, clipped_by_channel=("7.adaptive_avg_pool2d",))
