"""Weights alone in integers ("w8a16", "w4a16"): they are stored and read as such, and all else is as it was."""

import json
import math

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import PlacementError
from halfeven.runtimes.runtime import load_deployed

FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


class Block(nn.Module):
    """A transformer's second half, and a convolution, whose weights no runtime reads as integers here."""

    def __init__(self, width=64):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(4 * width, width, bias=False), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


LINEAR = ["up", "down", "head"]


def quantized(target, scheme, **options):
    torch.manual_seed(0)
    model, batches = Block().eval(), [torch.randn(4, 3, 16, 16) for _ in range(2)]
    return model, he.quantize(model, batches, target=target, scheme=scheme, **options), batches


@pytest.mark.parametrize("target", sorted(FILES))
@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_quantized_is_what_is_stored_and_read(target, bits, tmp_path):
    model, qmodel, batches = quantized(target, f"w{bits}a16", reconstruct="off")
    plan = he.plan_of(qmodel)
    assert plan.tensors == ()
    assert [weight.name for weight in plan.weights] == LINEAR
    path = he.export(qmodel, tmp_path / FILES[target])
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.weights_match
    assert (report.weight_layers, report.quantizable_layers, report.float_layers) == (3, 3, [])
    assert report.integer_macs == 0.0
    assert report.tensors == []
    assert math.isnan(report.integer_match), "nothing was compared, so nothing is shown"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["integer_match"] is None
    assert report.output_difference < 1e-5
    assert report.top1_agreement == 1.0
    assert "layers that read integer weights    3 of 3, in floating point" in str(report)
    assert "integers equal" not in str(report)
    expected = model(batches[0])
    noise = (load_deployed(path, target)(batches[0]) - expected).norm() / expected.norm()
    assert noise < (0.02 if bits == 8 else 0.3)
    assert noise > 1e-4


@pytest.mark.parametrize(("bits", "share"), [(8, 0.30), (4, 0.18)])
def test_files_are_as_small_as_their_weights(bits, share, tmp_path):
    """A large layer: its weights are nearly all of the file."""
    model, x = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 64)).eval(), torch.randn(2, 512)
    floats = 4 * sum(p.numel() for p in model.parameters())
    for target, name in FILES.items():
        qmodel = he.quantize(model, [x], target=target, scheme=f"w{bits}a16", reconstruct="off")
        path = he.export(qmodel, tmp_path / name)
        assert sum(part.stat().st_size for part in tmp_path.glob("model.*")) < share * floats
        report = he.verify(qmodel, path, [x], timed=False)
        assert (report.weights_match, report.weight_layers) == (True, 2)
        for part in tmp_path.glob("model.*"):
            part.unlink()


def test_types_in_the_files(tmp_path):
    _, qmodel, _ = quantized("openvino", "w4a16", reconstruct="off")
    read = openvino.Core().read_model(he.export(qmodel, tmp_path / "model.xml"))
    kinds = [op.get_element_type().get_type_name() for op in read.get_ordered_ops() if op.get_type_name() == "Constant"]
    assert kinds.count("i4") == 3
    _, qmodel, _ = quantized("onnxruntime", "w4a16", reconstruct="off")
    model = onnx.load(he.export(qmodel, tmp_path / "model.onnx"))
    assert {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")} == {21}
    stored = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4 and len(t.dims) == 2]
    assert len(stored) == 3
    assert all(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() == 7 for t in stored)


def test_learned_rounding_gains_at_4_bits():
    noise = {}
    for how in ("off", "layers"):
        model, qmodel, batches = quantized("openvino", "w4a16", reconstruct=how, iterations=300)
        x = torch.cat(batches)
        with torch.no_grad():
            noise[how] = float((qmodel(x) - model(x)).norm() / model(x).norm())
    assert noise["layers"] < 0.8 * noise["off"]


def test_it_is_trained_saved_and_loaded(tmp_path):
    model, _, batches = quantized("openvino", "w4a16", reconstruct="off")
    qmodel = he.calibrate(he.prepare(model, batches[0], scheme="w4a16", ranges="learned"), batches)
    qmodel.train()(batches[0]).square().mean().backward()
    assert qmodel.get_submodule("up.weight_quantizer").scale.grad.abs().sum() > 0
    he.save(qmodel, tmp_path / "q.safetensors")
    again = he.load(tmp_path / "q.safetensors", model, batches[0])
    assert torch.equal(again(batches[1]), qmodel.eval()(batches[1]))


def test_what_cannot_be_is_refused():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with pytest.raises(PlacementError, match="it has no such row"):
        he.prepare(model, x, target="tensorrt", scheme="w8a16")
    with pytest.raises(PlacementError, match="weights of 4 or 8 bits there"):
        he.prepare(model, x, scheme="w6a16")
    with pytest.raises(PlacementError, match="leaves all activations in floating point"):
        he.prepare(model, x, scheme="w8a16", quantize_outputs=True)
    with pytest.raises(PlacementError, match="No layer of this model would be quantized"):
        he.prepare(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), scheme="w8a16")
