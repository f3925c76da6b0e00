"""The runtime's own profile of a file names each layer, its kernel, its precision and its time."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.runtimes.layer_execution import slowest
from halfeven.runtimes.runtime import runtime_named
from runtimes.parity import SCHEME

FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


@pytest.mark.parametrize("target", sorted(FILES))
def test_layers_have_their_kernels_and_times(target, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    qmodel = he.prepare(net, x, target=target, scheme=SCHEME, rules=(he.Rule(pattern="2", quantize=False),))
    path = he.export(he.calibrate(qmodel, [x]), tmp_path / FILES[target])
    times = runtime_named(target).open_file(path, ()).kernel_times([x], runs=2)
    of_layer = {layer: time for time in times for layer in time.layers if layer in ("0", "4")}
    assert {layer: time.integer for layer, time in of_layer.items()} == {"0": True, "4": True}
    in_float = [time for time in times if "Conv" in time.kind and not time.integer]
    assert len(in_float) == 1
    assert in_float[0].precision in ("f32", "float32")
    assert all(time.milliseconds >= 0 for time in times)
    assert sum(time.milliseconds for time in times) > 0
    assert slowest(times, 1)[0].milliseconds == max(time.milliseconds for time in times)
