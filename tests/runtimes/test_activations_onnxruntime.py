"""Activation functions between quantizers are one kernel of ONNX Runtime, with the bits of the operators it fuses."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import halfeven as he
from runtimes.parity import SCHEME


def optimized(path, folder):
    """The operators that the runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    ("activation", "kernel"),
    [(nn.SiLU(), "QuickGelu"), (nn.GELU(), "Gelu"), (nn.GELU("tanh"), "FastGelu"), (nn.ELU(0.5), "Elu")],
)
def test_an_activation_is_one_kernel(activation, kernel, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3, groups=8), activation, nn.Conv2d(8, 4, 1))
    qmodel = he.calibrate(he.prepare(net.eval(), x, target="onnxruntime", scheme=SCHEME), [x])
    path = he.export(qmodel, tmp_path / "model.onnx")
    kinds = optimized(path, tmp_path)
    between = [kind for kind in kinds if kind not in ("QLinearConv", "Transpose", "DequantizeLinear", "QuantizeLinear")]
    assert between == [kernel, kernel]
    assert kinds.count("DequantizeLinear") == 3  # one for each activation, one for the output
    report = he.verify(qmodel, path, [x, torch.randn(2, 3, 8, 8)], timed=False)
    assert report.integer_match == 1
    assert not report.findings
