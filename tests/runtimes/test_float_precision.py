"""Files that leave the precision of float operators to the runtime: their settings, types, reports and refusals."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.cli.verify import problems_of
from halfeven.errors import ConfigError, ExportError
from halfeven.placement.insertion import plan_of
from halfeven.runtimes.onnx.file import BFLOAT16_PRODUCTS, WEIGHT_BIAS
from halfeven.runtimes.onnx.half import half_converter
from halfeven.runtimes.runtime import RUNTIMES
from runtimes.parity import quantized

DOCS = Path(__file__).parents[2] / "docs" / "targets"
FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx", "tensorrt": "model.onnx"}
IMAGE = (2, 3, 4, 4)


class Tokens(nn.Module):
    """Float operators of many kinds between layers in integers, two outputs, and a resize."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Upsample(scale_factor=2)
        self.norm, self.qkv, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.place = nn.Parameter(torch.randn(1, 64, 8) * 0.1)

    def forward(self, x):
        x = self.up(nn.functional.silu(self.stem(x)))
        tokens = self.norm(x.flatten(2).transpose(1, 2) + self.place)
        keys = self.qkv(tokens)
        mixed = (keys @ keys.transpose(1, 2) * 0.3).softmax(-1) @ keys
        return {"logits": self.last(nn.functional.gelu(tokens + mixed)).mean(1), "features": x.amax((2, 3))}


pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    net = Tokens()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfeven.quantization.compile._works", False)
        return {target: quantized(net, IMAGE, target=target) for target in FILES}


def exported(models, target, folder, **options):
    qmodel, batches = models[target]
    return qmodel, he.export(qmodel, folder / FILES[target], float_precision="runtime", **options), batches


def test_openvino_files_say_it_to_halfeven_and_to_default_sessions(models, tmp_path):
    qmodel, path, batches = exported(models, "openvino", tmp_path)
    model = openvino.Core().read_model(path)
    assert model.get_rt_info(["halfeven", "float_precision"]).astype(str) == "runtime"
    assert model.get_rt_info(["halfeven", "settings"]).astype(str) == "DYNAMIC_QUANTIZATION_GROUP_SIZE=0"
    compiled = openvino.Core().compile_model(model, "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0, "without a setting of the session"
    assert compiled.get_property("EXECUTION_MODE_HINT") == openvino.properties.hint.ExecutionMode.PERFORMANCE
    expected = compiled([batches[0].numpy()])
    found = he.load_deployed(path)(batches[0])
    assert all(np.array_equal(one.numpy(), expected[i]) for i, one in enumerate(found))
    report = he.verify(qmodel, path, batches, timed=False)
    assert (report.settings, report.float_precision) == (["DYNAMIC_QUANTIZATION_GROUP_SIZE=0"], "runtime")
    assert report.default_session.difference == 0
    assert "precision of float operators" in str(report)
    assert problems_of(report, 0.9999, allow_float=False) == []


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_the_snippet_reads_the_settings_of_the_file(models, target, tmp_path, monkeypatch):
    _, path, batches = exported(models, target, tmp_path)
    page = (DOCS / f"{target}.md").read_text().split("{ #precision }", 1)[1]
    names = {"images": batches[0].numpy()}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], names)
    expected = he.load_deployed(path, target)(batches[0])
    assert np.array_equal(names["outputs"][0], expected[0].numpy())


def test_onnx_files_list_the_setting_that_arm_has_kernels_for(models, tmp_path):
    qmodel, path, batches = exported(models, "onnxruntime", tmp_path)
    facts = {fact.key: fact.value for fact in onnx.load(path).metadata_props}
    assert facts["halfeven.settings"].split(", ")[-1] == BFLOAT16_PRODUCTS
    report = he.verify(qmodel, path, batches[:1], timed=False)
    assert WEIGHT_BIAS in report.settings
    assert BFLOAT16_PRODUCTS in report.settings
    assert report.alone_match == 1, "x86 computes in float32 all the same"


def test_openvino_follows_the_facts_of_an_onnx_file(models, tmp_path):
    qmodel, _ = models["openvino"]
    path = he.export(qmodel, tmp_path / "model.onnx", float_precision="runtime")
    assert OPENED(path).settings == ("DYNAMIC_QUANTIZATION_GROUP_SIZE=0",)
    assert OPENED(path, float_precision="f32").settings == ("EXECUTION_MODE_HINT=ACCURACY",)


def test_files_for_tensorrt_hold_float16_between_their_ends(models, tmp_path):
    qmodel, path, batches = exported(models, "tensorrt", tmp_path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {constant.name: constant.data_type for constant in graph.initializer}
    ends = {value.name for value in (*graph.input, *graph.output)}
    factors = {node.input[2] for node in graph.node if node.op_type == "Resize"}
    wide = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
    assert wide == ends | factors, "all floats are float16, but for the ends and the factors of a resize"
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert all(ends & {*node.input, *node.output} for node in casts)
    kinds = {types[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert kinds == {onnx.TensorProto.INT8}
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "QuantizeLinear")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {found.dtype for found in session.run(None, {"x": batches[0].numpy()})} == {np.dtype(np.float32)}
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.weights_match
    assert report.integer_layers == report.quantizable_layers == 3
    assert report.alone_match > 0.99, "the simulation rounds to float16 too, but an operator of several in a file once"
    assert report.findings == []
    assert problems_of(report, "auto", allow_float=False) == []
    most = dataclasses.replace(report, alone_match=0.995)
    assert problems_of(most, "auto", allow_float=False) == []
    assert len(problems_of(most, 0.9999, allow_float=False)) == 1, "a given number is never lowered"
    single = he.export(qmodel, tmp_path / "single.onnx")
    assert path.stat().st_size < single.stat().st_size
    assert he.verify(qmodel, single, batches[:1], timed=False).alone_match == 1


def test_tiny_scales_stay_above_zero_in_float16_and_numbers_beyond_it_are_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3))
    qmodel, batches = quantized(net, IMAGE, target="tensorrt")
    with torch.no_grad():
        qmodel.get_submodule("2").weight[0] *= 1e-9  # its scale would be 0
    path = he.export(he.calibrate(qmodel, batches), tmp_path / "model.onnx", float_precision="runtime")
    model = onnx.load(path)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    held = [onnx.numpy_helper.to_array(one) for one in model.graph.initializer if one.name in scales]
    assert {values.dtype for values in held} == {np.dtype(np.float16)}
    assert min(values.min() for values in held) > 0
    assert he.verify(qmodel, path, batches, timed=False).weights_match
    with torch.no_grad():
        qmodel.get_submodule("2").bias[0] = 1e6
    with pytest.raises(ExportError, match=r"2\.bias holds 1e\+06, and float16 ends at 65504.*f32"):
        he.export(qmodel, path, float_precision="runtime")


def test_ranges_beyond_float16_are_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3))
    qmodel, _ = quantized(net, IMAGE, target="tensorrt")
    calibrated = he.calibrate(qmodel, [torch.randn(IMAGE) * 1e6])
    with pytest.raises(ExportError, match=r"The range of \S+ ends at \S+, and float16 at 65504.*f32"):
        he.export(calibrated, tmp_path / "model.onnx", float_precision="runtime")
    assert not list(tmp_path.iterdir())


def test_the_converters_folder_is_no_place_of_modules():
    before = list(sys.path)
    half_converter()
    assert sys.path == before
    assert not [place for place in sys.path if place.endswith("onnxruntime/transformers")]


def test_a_runtime_of_float32_alone_refuses(models, tmp_path, monkeypatch):
    qmodel, _ = models["openvino"]
    row = dataclasses.replace(RUNTIMES["openvino"], settings_of_own_precision=None)
    monkeypatch.setitem(RUNTIMES, "openvino", row)
    with pytest.raises(ConfigError, match=r'float_precision="runtime" leaves.* float32 alone'):
        he.export(qmodel, tmp_path / "model.xml", float_precision="runtime")
    with pytest.raises(ConfigError, match='float_precision: it is a str "bf16", and must be "f32" or "runtime"'):
        he.export(qmodel, tmp_path / "model.xml", float_precision="bf16")
    assert not list(tmp_path.iterdir())
    assert plan_of(qmodel).options.target == "openvino"


OPENED = RUNTIMES["openvino"].open_file


class Coarse:
    """A file whose own session computes floats with few bits, as bfloat16 does on other processors than this."""

    def __init__(self, path, tensors=(), float_precision=None):
        self.file = OPENED(path, tensors, float_precision="f32")
        self.float_precision = float_precision or "runtime"
        self.settings = ("PRECISION=own",)
        self.names = tensors

    def __getattr__(self, name):
        return getattr(self.file, name)

    def run(self, inputs):
        outputs, tensors = self.file.run(inputs)
        if self.float_precision == "runtime":
            outputs = [x * 1.3 for x in outputs]
            tensors = {name: torch.where(x == x.flatten()[0], x.flatten()[1], x) for name, x in tensors.items()}
        return outputs, tensors

    def run_with(self, settings, inputs):
        return self.run(inputs)[0]


def test_where_the_runtimes_precision_moves_integers_float32_proves_the_file(models, tmp_path, monkeypatch):
    qmodel, path, batches = exported(models, "openvino", tmp_path)
    row = dataclasses.replace(RUNTIMES["openvino"], open_file=Coarse)
    monkeypatch.setitem(RUNTIMES, "openvino", row)
    report = he.verify(qmodel, path, batches[:1], timed=False)
    assert report.integer_match < 1
    assert report.output_difference > 0.2
    assert report.float32_session.alone_match > 0.999
    assert report.float32_session.output_difference < 0.01
    assert "with float operators in float32" in str(report)
    assert report.to_dict()["float32_session"]["first_difference"] == report.float32_session.first_difference
    assert report.findings == []
    assert report.notes
    assert all("In the runtime's own precision: " in note for note in report.notes if "accurac" not in note)
    assert problems_of(report, 0.999, allow_float=False) == []
    faulty = dataclasses.replace(report.float32_session, alone_match=0.9, first_difference="stem")
    (problem,) = problems_of(dataclasses.replace(report, float32_session=faulty), 0.999, allow_float=False)
    assert "in stem" in problem
