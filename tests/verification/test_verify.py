"""verify must see what is wrong: each test here breaks something."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError, VerificationError
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes import deploy
from halfeven.runtimes.exact_model import ExactModel
from halfeven.runtimes.openvino.session import OpenVINOFile, compile_model, read, request_with
from halfeven.runtimes.runtime import load_deployed
from halfeven.verification.circumstances import file_bytes
from halfeven.verification.report import Report, TensorParity
from runtimes.parity import SCHEME, quantized

IMAGE = (4, 3, 8, 8)


def net(middle=None):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        middle or nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    qmodel, batches = quantized(net(), IMAGE)
    return qmodel, he.export(qmodel, tmp_path_factory.mktemp("exported") / "model.xml"), batches


@pytest.fixture
def deployed(exported, tmp_path):
    """A model, its file and batches, for this test alone."""
    qmodel, path, batches = exported
    shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(qmodel), tmp_path / path.name, batches


def test_a_good_file(deployed):
    report = he.verify(*deployed)
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    required = {
        *("integer_match", "float_simulation_match", "max_lsb_difference", "integer_layers", "quantizable_layers"),
        *("top1_agreement", "latency_ratio", "weights_match", "first_difference", "last_integer_match"),
    }
    assert required <= set(values)
    assert values["integer_match"] == values["last_integer_match"] == values["top1_agreement"] == 1.0
    assert values["weights_match"] is True
    assert (values["integer_layers"], values["quantizable_layers"]) == (3, 3)
    assert values["float_layers"] == []
    assert values["samples"] == 12
    assert values["latency_batch"] == 4
    assert values["latency_ratio"] == values["latency_ms"]["deployed"] / values["latency_ms"]["float"] > 0
    assert values["accuracy"] == {}
    assert [t["name"] for t in values["tensors"]] == ["input", "2_relu", "4_relu", "5_adaptive_avg_pool2d"]
    assert [t["count"] for t in values["tensors"]] == [12 * n for n in (3 * 64, 8 * 64, 8 * 64, 8)]
    text = str(dataclasses.replace(report, slower=[]))  # which is noise in so small a model
    for words in ("100.0000 %", "3 of 3", "integer weights equal", "yes", "latency deployed / float", "0 LSB"):
        assert words in text
    lines = text.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert f"latency deployed, batch 4, {report.threads} thread" in text
    assert report.file_bytes == sum(Path(report.path).with_suffix(ending).stat().st_size for ending in (".xml", ".bin"))
    assert re.search(rf"file size +{report.file_bytes / 1e6:.2f} MB", text)
    assert "EXECUTION_MODE_HINT=ACCURACY" in text
    assert all(tensor.name in str(report.table()) for tensor in report.tensors)
    assert report._repr_html_().count("<pre") == 2


@pytest.mark.parametrize(("name", "beside"), [("m.xml", "m.bin"), ("m.onnx", "m.onnx.data")])
def test_the_size_of_a_file_counts_the_tensors_beside_it(tmp_path, name, beside):
    for path, size in ((name, 3), (beside, 4), ("other.bin", 5)):
        (tmp_path / path).write_bytes(b"x" * size)
    assert file_bytes(tmp_path / name) == 7


def test_a_report_of_many_layers_in_float_is_short_and_its_table_whole():
    names = [f"a.long.name.of.a.block.and.its.layer_{i} (f32 brgconv_avx512_1x1)" for i in range(60)]
    values = dict.fromkeys(("samples", "integer_layers", "weight_layers", "max_lsb_difference", "latency_batch"), 1)
    shares = ("integer_match", "alone_match", "last_integer_match", "float_simulation_match", "integer_macs")
    values |= dict.fromkeys((*shares, "top1_agreement", "float_simulation_top1_agreement", "latency_ratio"), 0.5)
    report = Report(
        path="m.onnx", runtime="a runtime", weights_match=True, quantizable_layers=61, float_layers=names, accuracy={},
        float_macs={name: 0.01 for name in names}, output_difference=0.0, latency_ms={}, unseen=names,
        first_difference="", tensors=[TensorParity("x", count=3)], findings=["The file is another model's."],
        settings=[f"long={'abcdefghij' * 8}", "session.qdq_matmulnbits_accuracy_level=1"], **values,
    )  # fmt: skip
    lines = str(report).splitlines()
    assert len(lines) <= 25 + 2
    assert max(map(len, lines)) <= 80
    assert ["session.qdq_matmulnbits_accuracy_level", "1"] in [line.split() for line in lines]
    assert "long" + "abcdefghij" * 8 in "".join(str(report).split())
    assert lines[-1].strip() == "The file is another model's."
    joined = "".join(str(report.table()).split())
    assert all("".join(name.split()) in joined for name in names)


def edit_bin(path, change):
    """Change the weights' file, an array of bytes, in place."""
    data = np.fromfile(path.with_suffix(".bin"), dtype=np.int8)
    change(data)
    data.tofile(path.with_suffix(".bin"))


def find(data, integers):
    """Where a layer's integers lie in the file."""
    wanted = integers.numpy().astype(np.int8).tobytes()
    return data.tobytes().index(wanted)


def folded_integers(qmodel, name):
    from halfeven.deployment.deployed import deployed_form
    from halfeven.quantization.arithmetic import per_channel

    layer = deployed_form(qmodel).get_submodule(name)
    scale = per_channel(layer.weight_quantizer.scale, 0, layer.weight.ndim)
    return torch.round(layer.weight / scale).flatten()


def test_one_changed_weight_is_seen(deployed):
    qmodel, path, batches = deployed
    integers = folded_integers(qmodel, "3")

    def change(data):
        place = find(data, integers) + 4  # the middle of the first filter
        data[place] = -data[place] if data[place] else 5

    edit_bin(path, change)
    report = he.verify(qmodel, path, batches, timed=False)
    assert not report.weights_match
    assert ["another checkpoint" in finding for finding in report.findings] == [True], "no advice about layers"
    assert report.integer_match < 1.0
    assert report.first_difference == "4_relu"
    first, *others = [t for t in report.tensors if t.different]
    assert first.different == first.different_alone
    assert 0 < first.different <= first.count / 8  # one channel
    assert report.max_lsb_difference >= 1
    assert "NO" in str(report)
    # What follows is only consequence: given the runtime's integers, the layers after it are right.
    assert all(t.different_alone == 0 for t in others)


def test_a_weight_that_changes_nothing_visible_is_seen(deployed):
    """In a channel that ReLU silences no activation differs: the weights themselves are compared."""
    qmodel, path, batches = deployed
    with torch.no_grad():
        qmodel.get_submodule("3").bias[0] = -100.0
    he.export(qmodel, path)
    integers = folded_integers(qmodel, "3")

    def change(data):
        place = find(data, integers) + 4
        data[place] = data[place] + 1 if data[place] < 100 else data[place] - 1

    edit_bin(path, change)
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1.0
    assert not report.weights_match


def widen(path):
    """Make the range of one activation 2 % wider in a file."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "quantizers.2_relu.scale":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.02), tensor.name))
            break
    else:
        pytest.fail("the scale was not found")
    onnx.save(model, path)


SIGNED = (he.Rule(kind="convolution", signed=True, symmetric=True),)


@pytest.mark.parametrize(
    ("scheme", "rules", "expected"),
    [
        ("w8a8", (), True),
        ("w7a8", (), False),
        ("w8a7", (), False),
        ("w8a7", SIGNED, True),  # signed integers are written around 128, and reach 191
        ("w7a7", SIGNED, False),
    ],
)
def test_only_weights_of_8_bits_overflow(scheme, rules, expected, tmp_path, monkeypatch):
    """Other integers on a processor without VNNI have another reason where no weight needs more than 7 bits."""
    qmodel, batches = quantized(net(), IMAGE, scheme=scheme, rules=rules)
    path = he.export(qmodel, tmp_path / "model.onnx")
    widen(path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match < 1.0
    assert report.overflows is expected
    assert ("this processor has no VNNI" in str(report)) is expected


def test_a_file_that_is_not_run_does_not_overflow(tmp_path, monkeypatch):
    qmodel, batches = quantized(net(), IMAGE, target="tensorrt")
    path = he.export(qmodel, tmp_path / "model.onnx")
    widen(path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match < 1.0
    assert not report.overflows


def test_a_changed_range_is_seen(tmp_path):
    qmodel, batches = quantized(net(), IMAGE)
    path = he.export(qmodel, tmp_path / "model.onnx")
    widen(path)
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match < 0.99
    assert report.first_difference == "2_relu"
    assert report.weights_match


def test_a_changed_bias_is_seen(deployed):
    qmodel, path, batches = deployed
    with torch.no_grad():
        qmodel.get_submodule("3").bias[2] += 0.05
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.weights_match
    assert report.first_difference == "4_relu"
    assert report.integer_match < 1.0


def test_another_models_file_is_an_error(deployed, tmp_path):
    qmodel, _, batches = deployed

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(torch.relu(self.features(x)).mean((2, 3)))

    other, _ = quantized(Other(), IMAGE)
    path = he.export(other, tmp_path / "other.xml")
    with pytest.raises(VerificationError, match=r"not written from.*this model.*Export the model again"):
        he.verify(qmodel, path, batches, timed=False)


def test_the_file_before_training_is_not_that_after(deployed):
    qmodel, path, batches = deployed
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    report = he.verify(qmodel, path, batches, timed=False)
    assert not report.weights_match
    assert report.integer_match < 0.9


def test_layers_that_the_runtime_leaves_in_float_are_named(deployed, tmp_path):
    """A convolution whose input has 128 levels: OpenVINO computes it in float and says nothing."""
    qmodel, path, batches = deployed
    seven = with_levels(path, tmp_path / "seven.xml", "quantizers.2_relu", 128)
    report = he.verify(qmodel, seven, batches, timed=False)
    assert report.integer_layers < report.quantizable_layers == 3
    assert any(name.startswith("3 (") for name in report.float_layers)
    assert "in float" in str(report)


def with_levels(path, new, name, levels):
    text = path.read_text()
    start = text.index(f'name="{name}"')
    end = text.index("levels=", start)
    changed = text[:end] + f'levels="{levels}"' + text[text.index(" ", end) :]
    new.write_text(changed)
    new.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes())
    return new


def test_labels_give_accuracies(deployed):
    qmodel, path, batches = deployed
    float_model = net().eval()
    qmodel.eval()
    labelled = []
    for x in batches:
        labels = qmodel(x).argmax(1)
        labels[0] = (labels[0] + 1) % 5
        labelled.append((x, labels))
    report = he.verify(qmodel, path, labelled, float_model, timed=False)
    right = sum(int((float_model(x).argmax(1) == y).sum()) for x, y in labelled)
    assert report.accuracy == {"float": 100 * right / 12, "simulated": 75.0, "deployed": 75.0}
    assert "top-1 float" in str(report)


def test_modes_come_back(deployed):
    qmodel, path, batches = deployed
    qmodel.train()
    qmodel.get_submodule("1").eval()
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    float_model = net().train()
    he.verify(qmodel, path, batches, float_model)
    assert qmodel.training
    assert float_model.training
    assert not qmodel.get_submodule("1").training
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())


def test_no_batch_and_no_file_are_errors(deployed, tmp_path):
    qmodel, path, batches = deployed
    with pytest.raises(VerificationError, match="no batch"):
        he.verify(qmodel, path, [])
    with pytest.raises(VerificationError, match="no file"):
        he.verify(qmodel, tmp_path / "none.xml", batches)
    (tmp_path / "bad.xml").write_text("<net>")
    with pytest.raises(VerificationError, match="cannot read"):
        he.verify(qmodel, tmp_path / "bad.xml", batches)


def test_a_long_loader_is_read_as_far_as_it_is_needed(deployed):
    qmodel, path, batches = deployed
    read = []

    def loader():
        for batch in batches * 9:
            read.append(batch)
            yield batch

    wanted = len(batches[0]) + 1
    report = he.verify(qmodel, path, loader(), timed=False, samples=wanted)
    assert (report.samples, len(read)) == (2 * len(batches[0]), 2)
    with pytest.raises(ConfigError, match="samples"):
        he.verify(qmodel, path, batches, samples=0)


def test_batches_of_dicts_and_a_generator(tmp_path):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, *, pixels):
            return {"logits": self.fc(torch.relu(self.conv(pixels)).mean((2, 3)))}

    batches = [{"pixels": torch.randn(IMAGE)} for _ in range(2)]
    qmodel = he.quantize(Keyword().eval(), batches, scheme=SCHEME)
    path = he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, path, (batch for batch in batches), timed=False)
    assert isinstance(report, Report)
    assert report.samples == 8
    assert report.integer_match == 1.0


def test_a_quantized_tensor_that_is_shared_is_compared_at_each_place(tmp_path):
    class Concat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 4, 3)

        def forward(self, x):
            return self.last(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1))

    qmodel, batches = quantized(Concat(), IMAGE)
    path = he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, path, batches, timed=False)
    assert [t.count for t in report.tensors] == [12 * 64 * n for n in (3, 4, 6)]
    assert report.integer_match == 1.0
    with torch.no_grad():
        qmodel.get_submodule("b").bias += 0.1
    report = he.verify(qmodel, path, batches, timed=False)
    assert [t.different > 0 for t in report.tensors] == [False, False, True]


def test_each_weight_is_quantized_once_and_then_as_before(deployed, monkeypatch):
    qmodel, path, batches = deployed
    calls = []

    def counted(x, *args, precomputed=None, **kwargs):
        if isinstance(x, nn.Parameter) and precomputed is None:
            calls.append(x)
        return fake_quantize(x, *args, precomputed=precomputed, **kwargs)

    monkeypatch.setattr("halfeven.quantization.quantizer.fake_quantize", counted)
    he.verify(qmodel, path, batches, timed=False)
    assert len(calls) == 3
    assert all(quantizer.cached is None for quantizer in quantizers(qmodel).values())
    with torch.no_grad():
        before = qmodel(batches[0])
        qmodel.get_submodule("3").weight.mul_(0.5)
        assert not torch.equal(qmodel(batches[0]), before)


def test_layers_alone_are_computed_only_where_integers_differ(deployed, monkeypatch):
    qmodel, path, batches = deployed
    runs = []
    forward = ExactModel.forward
    monkeypatch.setattr(
        ExactModel, "forward", lambda self, *args: runs.append(dict(self.simulation.given)) or forward(self, *args)
    )
    report = he.verify(qmodel, path, batches, timed=False)
    assert runs == [{}] * len(batches)
    assert all(tensor.different_alone == 0 for tensor in report.tensors)


def test_latency_times_the_model_alone(deployed):
    _, path, batches = deployed
    request = request_with(compile_model(read(path)), [batches[0]])
    request.infer(share_inputs=True, share_outputs=True)
    assert torch.equal(torch.from_numpy(request.get_output_tensor(0).data), load_deployed(path)(batches[0]))


def test_a_quantizer_that_runs_after_a_max_pool_is_compared_where_the_plan_has_it(tmp_path):
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1))
    qmodel, batches = quantized(net(pooled), IMAGE)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1.0
    assert report.float_simulation_match > 0.99
    assert next(t.count for t in report.tensors if t.name == "2_relu") == 12 * 8 * 64


def test_tensors_that_a_converter_merged_are_named_and_not_compared(tmp_path):
    deep = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU())))
    qmodel, batches = quantized(deep, IMAGE)
    path = he.export(qmodel, tmp_path / "model.xml")
    path.write_text(path.read_text().replace("quantizers.9_relu", "other"))
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.unseen == ["9_relu"]
    assert "9_relu" not in [tensor.name for tensor in report.tensors]
    assert "merged by the converter" in str(report)
    assert report.integer_match == 1.0
    for number in (5, 7):
        path.write_text(path.read_text().replace(f"quantizers.{number}_relu", f"other{number}"))
    with pytest.raises(VerificationError, match="lacks the quantized tensors"):
        he.verify(qmodel, path, batches, timed=False)


def test_verification_without_timing(deployed):
    report = he.verify(*deployed, timed=False)
    assert report.latency_ms == {}
    assert np.isnan(report.latency_ratio)
    assert "latency deployed" not in str(report)


def test_outputs_are_of_the_file_as_users_run_it_not_of_the_one_that_is_watched(deployed, tmp_path, monkeypatch):
    """To be outputs keeps operators from being fused, so the file is run once more without: here that is another."""
    qmodel, path, batches = deployed
    assert he.verify(qmodel, path, batches, timed=False).output_difference == 0
    other, _ = quantized(net(nn.Conv2d(8, 8, 3)), IMAGE)
    monkeypatch.setattr(OpenVINOFile, "plain", compile_model(read(he.export(other, tmp_path / "other.xml"))))
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1.0
    assert report.output_difference > 0


def test_the_share_of_work_in_integers_counts_layers_in_float(tmp_path):
    model = net(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ELU(), nn.Conv2d(8, 8, 3, padding=1)))
    rules = (he.Rule(pattern="3.2", quantize=False),)
    qmodel, batches = quantized(model, IMAGE, rules=rules)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    stem, each, head = 64 * 8 * 27, 64 * 8 * 72, 40
    assert report.integer_macs == pytest.approx((stem + each + head) / (stem + 2 * each + head))


class Recurrent(nn.Module):
    """Two layers beside recurrent cells, which do most of the work."""

    def __init__(self):
        super().__init__()
        self.first, self.cells, self.last = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.cells(self.first(x).relu())[0][:, -1])


@pytest.mark.parametrize("leave_out", [(), ("cells",)])
def test_the_share_of_work_counts_recurrent_cells_and_what_stays_python(leave_out, tmp_path):
    qmodel, batches = quantized(Recurrent(), (4, 6, 8), target="onnxruntime", leave_out=leave_out)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.onnx"), batches, timed=False)
    layers, cells = 6 * 64 + 32, 6 * 3 * 8 * 16
    assert (report.integer_layers, report.quantizable_layers) == (2, 2)
    assert report.integer_macs == pytest.approx(layers / (layers + cells))
    ((name, share),) = report.float_macs.items()
    assert name.startswith("cells")
    assert share == pytest.approx(cells / (layers + cells))
    assert f"in float, {name}" in str(report)


class Clamped(nn.Module):
    """Three layers with a clamp of their own, at the same bounds: the converter makes one of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        for number in range(3):
            self.register_buffer(f"low_{number}", torch.tensor(-1.0))

    def forward(self, x):
        return sum(layer(x.clamp(getattr(self, f"low_{n}"))) for n, layer in enumerate(self.layers))


def test_tensors_that_equal_another_one_may_be_merged_however_many(tmp_path):
    qmodel, batches = quantized(Clamped(), (4, 6))
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert len(report.unseen) == 2
    assert len(report.tensors) == 1
    assert report.integer_match == 1.0


@pytest.mark.parametrize(
    ("call", "traces"),
    [
        (lambda qmodel, path, batches: he.export(qmodel, path.with_name("again.xml")), 1),
        (lambda qmodel, path, batches: he.verify(qmodel, path, batches), 1),  # the float model, whose latency is taken
        (lambda qmodel, path, batches: he.verify(qmodel, path, batches, timed=False), 0),
        (lambda qmodel, path, batches: he.exact(qmodel)(batches[0]), 0),
    ],
    ids=["export", "verify", "verify untimed", "exact"],
)
def test_a_model_is_deployed_and_traced_once_a_call(call, traces, tmp_path, monkeypatch):
    qmodel, batches = quantized(net(), IMAGE)
    path = he.export(qmodel, tmp_path / "model.xml")
    deployed_form, trace = deploy.deployed_form, torch.export.export
    built, traced = [], []
    monkeypatch.setattr(deploy, "deployed_form", lambda model: built.append(model) or deployed_form(model))
    monkeypatch.setattr(torch.export, "export", lambda *args, **how: traced.append(args) or trace(*args, **how))
    call(qmodel, path, batches)
    assert built == [qmodel]
    assert len(traced) == traces
