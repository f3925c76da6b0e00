"""A runtime is one row: a made-up one takes a model through prepare, export and verify."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.placement.insertion import plan_of
from halfeven.runtimes.deploy import deploy
from halfeven.runtimes.layer_execution import LayerExecution
from halfeven.runtimes.onnx import writer
from halfeven.runtimes.onnx.file import stored_integers
from halfeven.runtimes.runtime import RUNTIMES, Runtime, runtime_named
from halfeven.targets.onnxruntime import ONNXRUNTIME
from runtimes.parity import quantized

IMAGE = (2, 3, 8, 8)


class EvaluatedFile:
    """An ONNX file that onnx's own evaluator computes, in NumPy."""

    runtime = "onnx's evaluator"
    settings = ()
    float_precision = "f32"
    threads = 0

    def __init__(self, path, tensors=()):
        self.model = onnx.load(path)
        self.own = [output.name for output in self.model.graph.output]
        made = {name for node in self.model.graph.node for name in node.output}
        self.tensors = [name for name in tensors if name in made]
        watched = onnx.ModelProto()
        watched.CopyFrom(self.model)
        for name in set(self.tensors) - set(self.own):
            watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self.input_names = [found.name for found in self.model.graph.input]
        self.evaluator = ReferenceEvaluator(watched)

    def run(self, inputs):
        names = [*self.own, *self.tensors]
        fed = {found.name: x.numpy() for found, x in zip(self.model.graph.input, inputs, strict=True)}
        values = [torch.from_numpy(np.array(x)) for x in self.evaluator.run(names, fed)]
        return values[: len(self.own)], dict(zip(self.tensors, values[len(self.own) :], strict=True))

    def run_with(self, settings, inputs):
        return self.run(inputs)[0]

    def executed_layers(self, layers):
        return [LayerExecution(layer, "int8", "numpy", integer=True) for layer in layers]

    def executed_products(self):
        return []

    def stored_integers(self, layers):
        return stored_integers(self.model, layers)

    def timed(self, inputs):
        return lambda: self.run(inputs)

    def kernel_times(self, inputs, runs=10):
        return []


@pytest.fixture
def made_up(monkeypatch):
    prepared = []
    row = Runtime(
        target=dataclasses.replace(ONNXRUNTIME, name="made-up", int32_bias=False, outputs=frozenset()),
        writers={".onnx": writer.write},
        clips_integers=True,
        prepare_graph=prepared.append,
        open_file=EvaluatedFile,
        exact=None,
        sums_in_16_bits=lambda: False,
        settings=(),
    )
    monkeypatch.setitem(RUNTIMES, "made-up", row)
    return prepared


def test_a_made_up_runtime_is_one_row(made_up, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    qmodel, batches = quantized(net, IMAGE, target="made-up", scheme="w8a8", quantize_outputs=True)
    assert str(plan_of(qmodel)).startswith("Plan for made-up")
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.onnx"), batches)
    assert len(made_up) == 2, "export and verify each prepare the graph for it once"
    assert report.runtime == "onnx's evaluator"
    assert sum(tensor.count for tensor in report.tensors) > 2000
    assert report.alone_match > 0.999, "both compute as ONNX defines it, but for the order of sums"
    assert report.weights_match
    assert report.integer_layers == report.quantizable_layers == 2
    assert report.latency_ms.keys() == {"float", "deployed"}
    with pytest.raises(ConfigError, match=r"made-up cannot read.*\.onnx"):
        he.export(qmodel, tmp_path / "model.xml")


def test_a_misspelt_runtime_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r'no runtime "openvin".*Did you mean openvino'):
        runtime_named("openvin")
    with pytest.raises(ConfigError, match=r'no runtime "tvm".*There are openvino, onnxruntime, tensorrt'):
        he.prepare(nn.Linear(4, 4), torch.randn(2, 4), target="tvm")


def test_every_row_says_how_its_files_are_written_and_opened():
    for name, row in RUNTIMES.items():
        assert row.name == row.target.name == name
        assert row.writers
        assert row.interpreter is row.exact or row.exact is None


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.stem(x)
        return self.last(torch.relu(y) + torch.tanh(y))


@pytest.mark.parametrize(("target", "given"), [("openvino", True), ("onnxruntime", False), ("tensorrt", False)])
def test_a_bias_against_openvinos_optimizer_is_in_openvinos_form_alone(target, given):
    qmodel, _ = quantized(ReadTwice(), IMAGE, target=target, scheme="w8a8")
    bias = deploy(qmodel, RUNTIMES[target]).model.get_submodule("stem").bias
    assert (bias is not None) is given
