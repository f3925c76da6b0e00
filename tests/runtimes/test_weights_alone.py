"""Weights alone in integers ("w8a16", "w4a16"): they are stored and read as such, and all else is as it was."""

import dataclasses
import json
import math

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.deployment.exported_program import example_of, exported_program
from halfeven.errors import PlacementError
from halfeven.runtimes.deploy import deploy
from halfeven.runtimes.onnx import writer as onnx_writer
from halfeven.runtimes.onnx.file import ACCURACY_LEVEL
from halfeven.runtimes.onnxruntime.writer import block_of, packed_blocks, unpacked_blocks
from halfeven.runtimes.runtime import RUNTIMES, load_deployed
from halfeven.verification.default_session import DefaultSession

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
    assert "layers that read integer weights 3 of 3, in floating point" in words(report)
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
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert [node.name for node in products] == LINEAR
    for node in products:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (given["bits"], given["accuracy_level"]) == (4, 1)
        integers = unpacked_blocks(constants[node.input[1]], 4, given["K"])
        assert np.abs(integers).max() == 7
        assert integers.shape == qmodel.get_submodule(node.name).weight.shape
    path = he.export(qmodel, tmp_path / "other.onnx", "openvino")
    stored = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT4 and len(t.dims) == 2]
    assert len(stored) == 3, "OpenVINO reads ONNX's own integers of 4 bits"


def words(report):
    return " ".join(str(report).split())


def test_the_default_session_computes_what_was_verified(tmp_path):
    """Its precision stands in the file. In a file that leaves it to the session, the default rounds the inputs."""
    _, qmodel, batches = quantized("onnxruntime", "w8a16", reconstruct="off")
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.onnx"), batches, timed=False)
    assert report.default_session == DefaultSession(0.0, [])
    plain = dataclasses.replace(RUNTIMES["onnxruntime"], writers={".onnx": onnx_writer.write})
    deployed = deploy(qmodel, plain)
    onnx_writer.write(exported_program(deployed.model, *example_of(qmodel)), deployed, tmp_path / "plain.onnx")
    report = he.verify(qmodel, tmp_path / "plain.onnx", batches, timed=False)
    assert report.weights_match
    assert report.weight_layers == 3
    assert report.default_session.difference > 1e-4
    assert report.default_session.settings == [ACCURACY_LEVEL]
    assert ACCURACY_LEVEL.replace("=", " ") in words(report)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [1, 16, 17, 100, 128, 300])
def test_packed_weights_are_unpacked(bits, inputs):
    largest = 2 ** (bits - 1) - 1
    weight = np.random.default_rng(0).integers(-largest, largest + 1, (5, inputs))
    packed = packed_blocks(weight, bits, block_of(inputs))
    assert packed.dtype == np.uint8
    assert packed.shape == (5, -(-inputs // block_of(inputs)), block_of(inputs) * bits // 8)
    assert np.array_equal(unpacked_blocks(packed, bits, inputs), weight)


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
