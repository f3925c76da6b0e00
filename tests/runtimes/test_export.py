"""What is in the files, and that a file is there whole or not at all."""

import sys

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import halfeven as he
from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.errors import CalibrationError, ConfigError, ExportError, StorageError
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes.runtime import load_deployed
from processes import run
from runtimes.parity import SCHEME, quantized, trained
from sweeps import crossed

IMAGE = (2, 3, 8, 8)


def net(width=32):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_openvino_holds_int8_weights(tmp_path):
    model = net()
    qmodel, _ = quantized(model, IMAGE)
    path = he.export(qmodel, tmp_path / "model.xml")
    assert path == tmp_path / "model.xml"
    read = openvino.Core().read_model(path)
    constants = [op for op in read.get_ordered_ops() if op.get_type_name() == "Constant"]
    stored = sum(
        np.prod(op.shape) for op in constants if op.get_element_type() == openvino.Type.i8 and len(op.shape) > 1
    )
    assert stored == weights(model)
    largest_float = max(np.prod(op.shape, initial=1) for op in constants if op.get_element_type() == openvino.Type.f32)
    assert largest_float <= 32
    assert (tmp_path / "model.bin").stat().st_size < weights(model) * 1.2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_signals_are_handled_after_a_file_was_closed(tmp_path):
    """Each `openvino.Core` gives its thread a stack for signal handlers; one that is freed must not stay."""
    qmodel, _ = quantized(net(), IMAGE)
    path = he.export(qmodel, tmp_path / "model.xml")
    code = f"""
import os, signal
from halfeven.runtimes.openvino.session import compile_model, read
first, second = (compile_model(read({str(path)!r})) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_onnx_is_qdq_with_int8_initializers(tmp_path):
    model = net()
    qmodel, _ = quantized(model, IMAGE)
    read = onnx.load(he.export(qmodel, tmp_path / "model.onnx"))
    onnx.checker.check_model(read, full_check=True)
    assert [(entry.domain, entry.version) for entry in read.opset_import if entry.domain in ("", "ai.onnx")] == [
        ("", 19)
    ]
    kinds = {tensor.name: tensor for tensor in read.graph.initializer}
    integers = [t for t in kinds.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert sum(np.prod(t.dims) for t in integers) == weights(model)
    assert all(abs(numpy_helper.to_array(t).astype(int)).max() <= 127 for t in integers)
    assert all(len(t.dims) <= 1 for t in kinds.values() if t.data_type == onnx.TensorProto.FLOAT)
    operators = [node.op_type for node in read.graph.node]
    assert operators.count("DequantizeLinear") == operators.count("QuantizeLinear") + 3
    assert not any(node.domain for node in read.graph.node)
    # A weight is dequantized, never quantized again.
    for node in read.graph.node:
        if node.op_type == "QuantizeLinear":
            assert node.input[0] not in kinds
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
@pytest.mark.parametrize("example", [1, 3])
def test_any_batch_size(suffix, example, tmp_path):
    qmodel, _ = quantized(net(8), (example, 3, 8, 8))
    run = load_deployed(he.export(qmodel, tmp_path / f"model{suffix}"))
    x = torch.randn(7, 3, 8, 8)
    whole = run(x)
    assert whole.shape == (7, 10)
    for one in range(7):
        assert torch.equal(run(x[one : one + 1])[0], whole[one])


@pytest.mark.parametrize(
    ("scheme", "suffix"), crossed([SCHEME, "w4a8", "w4a4", "w6a6", "w3a7", "w2a8"], [".xml", ".onnx"])
)
def test_all_widths_run_in_integers(scheme, suffix, tmp_path):
    qmodel, batches = quantized(net(8), (32, 3, 8, 8), scheme=scheme, activation_observer="mse")
    report = he.verify(qmodel, he.export(qmodel, tmp_path / f"model{suffix}"), batches, timed=False)
    assert report.top1_agreement == 1.0
    assert report.integer_match == 1.0
    assert report.weights_match
    assert report.integer_layers == report.quantizable_layers == 3
    assert report.float_simulation_top1_agreement >= 0.98


def test_few_bits_stay_on_their_own_grid(tmp_path):
    qmodel, _ = quantized(net(8), (8, 3, 8, 8), scheme="w3a4")
    read = onnx.load(he.export(qmodel, tmp_path / "model.onnx"))
    integers = [t for t in read.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert max(abs(numpy_helper.to_array(t).astype(int)).max() for t in integers) == 3
    run = load_deployed(tmp_path / "model.onnx")
    clipped = torch.full((1, 3, 8, 8), 1e4)
    qmodel.eval()
    torch.testing.assert_close(run(clipped), qmodel(clipped), rtol=1e-3, atol=1e-3)


def test_onnx_runtime_computes_the_same(tmp_path):
    import onnxruntime

    qmodel, (x, *_) = quantized(net(8), (8, 3, 8, 8))
    he.export(qmodel, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), qmodel(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["model.pt", "model", "model.tflite"])
def test_another_ending_is_an_error(name, tmp_path):
    qmodel, _ = quantized(net(8), IMAGE)
    with pytest.raises(ConfigError, match=r"\.xml or \.onnx"):
        he.export(qmodel, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_ranges_is_an_error(tmp_path):
    qmodel = he.prepare(trained(net(8)), torch.randn(IMAGE))
    with pytest.raises(CalibrationError, match="no range yet"):
        he.export(qmodel, tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_an_example_is_an_error(tmp_path):
    qmodel, _ = quantized(net(8), IMAGE)
    del qmodel.halfeven_example
    with pytest.raises(ExportError, match="no example input"):
        he.export(qmodel, tmp_path / "model.xml")


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_a_failure_leaves_the_old_file_and_nothing_else(suffix, tmp_path, monkeypatch):
    qmodel, _ = quantized(net(8), IMAGE)
    path = he.export(qmodel, tmp_path / f"model{suffix}")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(openvino, "save_model", fail)
    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(StorageError, match="no space left on device"):
        he.export(qmodel, path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_operator_that_the_format_lacks_is_an_error(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.special.bessel_j1(self.fc(x))

    qmodel, _ = quantized(Odd(), (2, 4))
    for suffix in (".xml", ".onnx"):
        with pytest.raises(ExportError, match=r"could not be written.*leave_out|leave_out"):
            he.export(qmodel, tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_export_changes_nothing_and_makes_folders(tmp_path):
    qmodel, _ = quantized(net(8), IMAGE)
    qmodel.train()
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    he.export(qmodel, tmp_path / "a" / "b" / "model.xml")
    assert (tmp_path / "a" / "b" / "model.xml").is_file()
    assert qmodel.training
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    assert not any(isinstance(m, ExportedQuantizer) for m in qmodel.modules())


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, x, y):
            a, b = self.a(x), self.b(y)
            return {"sum": a + b, "a": a}

    example = {"x": torch.randn(2, 4), "y": torch.randn(2, 3)}
    qmodel = he.calibrate(he.prepare(Two().eval(), example, scheme=SCHEME), [example])
    for suffix in (".xml", ".onnx"):
        run = load_deployed(he.export(qmodel, tmp_path / f"model{suffix}"))
        found = run(example["x"], example["y"])
        expected = qmodel(**example)
        torch.testing.assert_close(found[0], expected["sum"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected["a"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_learned_zero_points_are_integers_of_the_grid(suffix, tmp_path):
    target = "openvino" if suffix == ".xml" else "onnxruntime"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
    qmodel, batches = quantized(model, IMAGE, target=target, ranges="learned", learn_zero_points=True)
    points = [q.zero_point for q in quantizers(qmodel).values() if q.zero_point.is_floating_point()]
    assert len(points) >= 2
    with torch.no_grad():
        points[0] -= 1.4
        points[1].fill_(-2.3)  # beyond the grid, as a large step of an optimizer makes it
    report = he.verify(qmodel, he.export(qmodel, tmp_path / f"model{suffix}"), batches, timed=False)
    assert report.integer_match == report.alone_match == 1.0
    assert report.float_simulation_match > 0.999
    assert not report.findings
