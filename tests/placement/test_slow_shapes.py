"""Layers of shapes that a runtime has no integer kernel for, or a slower one, stay in float, and the plan says why."""

import pytest
import torch
from torch import nn

from placement.parts import plan as plan_for


def chain(layer, channels):
    dims = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    convolution = dims[layer.weight.ndim]
    return nn.Sequential(convolution(3, channels, 1), nn.ReLU(), layer, convolution(layer.out_channels, 4, 1)).eval()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose1d(8, 8, 2, 2), None),
        (nn.ConvTranspose2d(8, 8, 4, 2, 1), None),
        (nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), None),
        (nn.ConvTranspose1d(8, 8, 16, 8, 4), "stride 8"),
        (nn.ConvTranspose2d(8, 8, 8, 4, 2), "stride 4"),
        (nn.ConvTranspose2d(8, 8, 3, 2, groups=4), "in groups"),
        (nn.ConvTranspose1d(8, 8, 3, 2, groups=8), "in groups"),
        (nn.ConvTranspose2d(8, 8, 1, 2), "larger than its kernel"),
    ],
)
def test_transposed_convolutions_of_openvino(layer, reason):
    plan = plan_for(chain(layer, 8), (2, 3, *[6] * (layer.weight.ndim - 2)), target="openvino")
    quantized = {weight.name for weight in plan.weights}
    assert ("2" in quantized) == (reason is None)
    reasons = {left.name: left.reason for left in plan.left}
    assert reason is None or reason in reasons["2"]


@pytest.mark.parametrize(
    ("channels", "groups", "integer"), [(8, 1, False), (32, 1, True), (8, 8, True), (32, 4, False)]
)
def test_volumes_of_onnxruntime(channels, groups, integer):
    layer = nn.Conv3d(channels, channels, 3, padding=1, groups=groups)
    enter = nn.Sequential(nn.Conv3d(32, channels, 1), nn.ReLU(), layer).eval()
    plan = plan_for(enter, (2, 32, 4, 4, 4), target="onnxruntime")
    assert ("2" in {weight.name for weight in plan.weights}) == integer
    assert integer or "volumes" in {left.name: left.reason for left in plan.left}["2"]


def test_functions_have_shapes_too():
    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Conv1d(3, 8, 1)
            self.weight = nn.Parameter(torch.randn(8, 8, 16))

        def forward(self, x):
            return nn.functional.conv_transpose1d(self.enter(x), self.weight * 1, stride=8)

    plan = plan_for(Function().eval(), (2, 3, 6), target="openvino")
    assert [weight.name for weight in plan.weights] == ["enter"]
