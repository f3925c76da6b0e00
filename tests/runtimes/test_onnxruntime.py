"""Parity on the real runtime: ONNX Runtime's integers equal the exact simulation's, for every row of the table."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import ConfigError, PlacementError
from halfeven.runtimes.deploy import deploy
from halfeven.runtimes.onnxruntime.session import ONNXRuntimeFile
from halfeven.runtimes.runtime import RUNTIMES, load_deployed
from runtimes.parity import quantized, trained
from runtimes.test_exact import (
    ALONE,
    IMAGE,
    IN_ONE_MODEL,
    MODELS,
    NOT_EXACT,
    ON_MORE_DATA,
    Block,
    Concat,
    Residual,
    activated,
    conv,
    side_by_side,
)
from sweeps import crossed, sweep


def report_of(model, shape, path, target="onnxruntime", export_for=None, **options):
    qmodel, batches = quantized(model, shape, target=target, **options)
    he.export(qmodel, path, target=export_for)
    return he.verify(qmodel, path, batches, target=export_for, timed=False)


def assert_parity(report, *, exact=True):
    assert report.weights_match
    assert report.float_layers == []
    assert report.integer_layers == report.quantizable_layers > 0
    assert sum(tensor.count for tensor in report.tensors) > 300
    if exact:
        assert report.integer_match == 1.0, report.first_difference
        assert (report.max_lsb_difference, report.first_difference) == (0, "")
    else:
        assert report.integer_match >= 0.9995
        assert report.max_lsb_difference <= 1
    assert report.float_simulation_match >= 0.985
    assert report.top1_agreement == 1.0


WITH_MORE_DATA = {"residual, signed", "depthwise, batch norm, relu6", "no activation", "mean", "concat"}


def test_rows_in_one_model(tmp_path):
    for names, model, shape in side_by_side((IN_ONE_MODEL | ON_MORE_DATA) - WITH_MORE_DATA):
        report = report_of(model, shape, tmp_path / "model.onnx")
        assert_parity(report)
        assert report.integer_macs == 1.0
        assert report.integer_layers >= 2 * len(names)


@pytest.mark.parametrize("name", sweep(sorted(MODELS), *ALONE))
def test_integers_equal_in_every_network(name, tmp_path):
    build, shape = MODELS[name]
    report = report_of(build(), shape, tmp_path / "model.onnx")
    assert report.runtime == "ONNX Runtime"
    in_float = name.startswith("transposed") or name in NOT_EXACT
    assert_parity(report, exact=not in_float)
    assert name.startswith("transposed") or report.integer_macs == 1.0


@pytest.mark.parametrize(
    ("scheme", "build"),
    crossed(["w4a8", "w4a4", "w8a6", "w3a3", "w7a8"], [Residual, Concat, lambda: activated(nn.ReLU6())]),
)
def test_integers_equal_at_other_bits(scheme, build, tmp_path):
    report = report_of(build(), IMAGE, tmp_path / "model.onnx", scheme=scheme)
    assert_parity(report)


@pytest.mark.parametrize("name", sorted(WITH_MORE_DATA))
def test_on_more_data(name, tmp_path):
    """One wrong order of float operations changes one integer in a hundred thousand."""
    report = report_of(MODELS[name][0](), (12, 3, 48, 48), tmp_path / "model.onnx")
    assert_parity(report)
    assert sum(tensor.count for tensor in report.tensors) > 80_000


@pytest.mark.parametrize("options", [{"quantize_outputs": True}, {"per_channel": False}, {"batchnorm": "fold"}])
def test_integers_equal_with_other_options(options, tmp_path):
    assert_parity(report_of(MODELS["residual, downsampled"][0](), IMAGE, tmp_path / "model.onnx", **options))


def test_a_layer_that_reads_two_grids_has_a_bias_for_each(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.last = conv(3), conv(), conv(8, 4)

        def forward(self, x):
            return self.last(F.relu(self.shared(F.relu(self.shared(self.stem(x))))))

    report = report_of(Twice(), IMAGE, tmp_path / "model.onnx")
    assert report.integer_match == 1.0
    assert report.float_layers == []
    assert report.quantizable_layers == 4


def test_layers_without_a_bias(tmp_path):
    model = nn.Sequential(
        conv(3, bias=False), nn.ReLU(), conv(8, 8, bias=False), nn.Flatten(), nn.Linear(512, 4, bias=False)
    )
    report = report_of(model, (4, 3, 8, 8), tmp_path / "model.onnx")
    assert_parity(report)
    assert report.integer_macs == 1.0


@pytest.mark.parametrize("axes", sweep([1, 2], 2))
def test_a_batchnorm_behind_a_layer_in_float_is_folded(axes, tmp_path):
    layer, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[axes]
    model = nn.Sequential(layer(3, 8, 3, bias=False), norm(8), nn.ReLU(), layer(8, 8, 3))
    left = [he.Rule(pattern="0", quantize=False)]
    qmodel, batches = quantized(model, (4, 3, *[9] * axes), target="onnxruntime", rules=left)
    he.export(qmodel, tmp_path / "model.onnx")
    kernels = [node.op_type for node in ONNXRuntimeFile(tmp_path / "model.onnx")._optimized()]
    assert "QLinearConv" in kernels
    assert not {"BatchNormalization", "Expand"} & set(kernels)
    assert he.verify(qmodel, tmp_path / "model.onnx", batches, timed=False).integer_match > 0.999


class Shares(nn.Module):
    """A softmax between two quantizers, as of attention whose scores a layer mixes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(4, 4), conv(4, 4)

    def forward(self, x):
        return self.last(self.first(x).softmax(-1))


@pytest.mark.parametrize("scheme", ["w8a8", "w7a7"])
def test_a_softmax_of_integers(scheme, tmp_path):
    """The runtime has a kernel for it, whose shares differ from those of a softmax in float by 1 in 2 of 100."""
    torch.manual_seed(0)
    report = report_of(Shares(), (8, 4, 49, 49), tmp_path / "model.onnx", scheme=scheme)
    assert "QLinearSoftmax" in [node.op_type for node in ONNXRuntimeFile(tmp_path / "model.onnx")._optimized()]
    assert [(tensor.name, tensor.count) for tensor in report.tensors] == [
        (name, 230496) for name in ("x", "first", "softmax", "last")
    ]
    assert report.tensors[2].different_alone == 0
    assert report.alone_match == 1.0 or report.overflows


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_bias_without_a_place_on_its_grid_gets_one(per_channel, tmp_path):
    model = trained(nn.Sequential(conv(3), nn.ReLU(), conv(8, 4)))
    with torch.no_grad():
        model[0].weight[2 if per_channel else slice(None)] *= 1e-9
        model[0].bias[2] = 1.0
    report = report_of(model, IMAGE, tmp_path / "model.onnx", per_channel=per_channel)
    assert report.integer_match == 1.0
    assert report.float_simulation_match > 0.99


def test_the_simulation_rounds_biases_as_the_runtime_does():
    torch.manual_seed(0)
    qmodel, batches = quantized(nn.Sequential(conv(3), nn.ReLU(), conv(8, 4)), IMAGE, target="onnxruntime")
    layer = qmodel.get_submodule("0")
    unit = qmodel.get_submodule("quantizers.input").scale * layer.weight_quantizer.scale
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    qmodel(batches[0])
    x = qmodel.get_submodule("quantizers.input")(batches[0])
    rounded = torch.round(layer.bias / unit) * unit
    assert not torch.equal(rounded, layer.bias)
    expected = F.conv2d(x, layer.weight_quantizer(layer.weight), rounded, padding=1)
    assert torch.allclose(seen[0], expected, atol=1e-6)
    qmodel.train()(batches[0]).sum().backward()
    assert layer.bias.grad is not None
    assert bool((layer.bias.grad != 0).all())


def test_the_exact_simulation_is_an_evaluation_mode(tmp_path):
    qmodel, batches = quantized(Residual(), IMAGE, target="onnxruntime")
    exact = he.exact(qmodel)
    path = he.export(qmodel, tmp_path / "model.onnx")
    found = load_deployed(path, "onnxruntime")(batches[0])
    assert torch.equal(exact(batches[0]), found)
    assert set(exact.codes) >= {"quantizers.x", "quantizers.relu", "quantizers.last"}
    x = torch.randn(256, *IMAGE[1:])
    assert not torch.equal(exact(x), qmodel(x)), "the float simulation is another one"
    with pytest.raises(PlacementError, match="tensorrt does not specify"):
        he.exact(qmodel, "tensorrt")


# One checkpoint, several files


@pytest.mark.parametrize(
    "name",
    sweep(
        ("conv, batch norm", "residual, downsampled", "residual, signed, no activation", "concat", "split", "mean"),
        *("residual, downsampled", "residual, signed, no activation", "concat"),
    ),
)
def test_a_model_made_for_onnx_runtime_in_openvino(name, tmp_path):
    build, shape = MODELS[name]
    report = report_of(build(), shape, tmp_path / "model.xml", export_for="openvino")
    assert report.runtime == "OpenVINO"
    assert_parity(report)


@pytest.mark.parametrize(("target", "path"), [("openvino", "model.xml"), ("onnxruntime", "model.onnx")])
def test_a_model_made_for_tensorrt_elsewhere(target, path, tmp_path):
    report = report_of(activated(nn.ReLU6()), IMAGE, tmp_path / path, target="tensorrt", export_for=target)
    assert report.integer_match == 1.0 or report.overflows
    assert report.integer_layers >= 2


def test_what_onnx_runtime_runs_in_float_of_a_model_made_for_openvino(tmp_path):
    report = report_of(Residual(), IMAGE, tmp_path / "model.onnx", target="openvino", export_for="onnxruntime")
    assert report.float_layers == ["conv2 (float32 FusedConv)", "last (float32 Conv)"]
    assert 0 < report.integer_macs < 1
    assert report.integer_match > 0.999
    assert report.weights_match


def test_tensorrt_refuses_zero_points(tmp_path):
    qmodel, _ = quantized(activated(nn.SiLU()), IMAGE)
    with pytest.raises(PlacementError, match="unsigned"):
        he.export(qmodel, tmp_path / "model.onnx", target="tensorrt")
    assert not list(tmp_path.iterdir())


def test_a_target_reads_its_own_files_only(tmp_path):
    qmodel, _ = quantized(activated(nn.ReLU()), IMAGE, target="onnxruntime")
    for refused in (
        lambda: he.export(qmodel, tmp_path / "model.xml"),
        lambda: he.verify(qmodel, tmp_path / "model.xml", [torch.zeros(IMAGE)]),
        lambda: load_deployed(tmp_path / "model.xml", "onnxruntime"),
    ):
        with pytest.raises(ConfigError, match=r"onnxruntime cannot read.*\.onnx, or the target .*: openvino"):
            refused()


# TensorRT, by the structure of its files


@pytest.mark.parametrize(
    "name", ["conv, batch norm", "residual, downsampled", "concat", "mean", "transposed", "attention"]
)
def test_tensorrts_file_computes_the_exact_integers(name, tmp_path):
    build, shape = MODELS[name]
    report = report_of(build(), shape, tmp_path / "model.onnx", target="tensorrt")
    assert "not run" in report.runtime
    assert_parity(report, exact=name != "attention")  # two softmaxes, of PyTorch and of ONNX
    model = onnx.load(tmp_path / "model.onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    biases = [node.input[2] for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2]
    assert all(constants[name].dtype == np.float32 for name in biases)


def test_tensorrt_fuses_the_residual_branch(tmp_path):
    report_of(Residual(), IMAGE, tmp_path / "model.onnx", target="tensorrt")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    (addition,) = [node for node in nodes if node.op_type == "Add"]
    assert sorted(makers[name] for name in addition.input) == ["Conv", "DequantizeLinear"]


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("build", [Residual, Concat])
def test_files_mean_by_onnx_own_evaluator_what_was_simulated(target, build, tmp_path):
    qmodel, batches = quantized(build(), (2, 3, 12, 12), target=target)
    path = he.export(qmodel, tmp_path / "model.onnx")
    (found,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": batches[0].numpy()})
    expected = qmodel(batches[0]).detach()
    # A rounding that falls the other way moves an output by a few steps, not more.
    assert float((torch.from_numpy(found) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert float((torch.from_numpy(found) - expected).abs().mean()) < 0.002 * float(expected.abs().max())


def test_attention_multiplies_integers(tmp_path):
    report = report_of(Block(), (4, 6, 16), tmp_path / "model.onnx")
    assert report.integer_macs == 1.0


def test_integer_biases_are_on_their_grid(tmp_path):
    qmodel, _ = quantized(activated(nn.ReLU()), IMAGE, target="onnxruntime")
    deployed = deploy(qmodel, RUNTIMES["onnxruntime"])
    bias = deployed.int32_biases["2"]
    assert torch.equal((bias.integers * bias.scale.double()).float(), deployed.model.get_submodule("2").bias)
    he.export(qmodel, tmp_path / "model.onnx")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert constants["2.bias.integers"].dtype == np.int32
    assert np.array_equal(constants["2.bias.integers"], bias.integers.numpy())
