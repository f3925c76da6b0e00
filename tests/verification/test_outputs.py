"""Every output of a file is compared, with the exact and with the float simulation, and what is large is said."""

import dataclasses
import re
from collections import namedtuple

import numpy as np
import onnx
import openvino
import openvino.opset13 as opset
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import halfeven as he
from halfeven.cli.verify import problems_of
from halfeven.errors import InputError, VerificationError
from halfeven.runtimes import deploy
from halfeven.verification.answers import Answers
from halfeven.verification.findings import judged as judged_session
from halfeven.verification.findings import spread_notes
from halfeven.verification.outputs import OutputParity, OutputSums, in_form_of, named_outputs
from halfeven.verification.report import TensorParity
from runtimes.parity import SCHEME, quantized

IMAGE = (4, 3, 8, 8)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.boxes, self.scores = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return {"detection": (self.boxes(x), x.amax((2, 3)).argmax(1)), "scores": self.scores(x.mean((2, 3)))}


def shifted_ir(path, place, amount):
    """Add a number to an output of an OpenVINO file."""
    model = openvino.Core().read_model(path)
    result = model.get_results()[place]
    source = result.input_value(0)
    result.input(0).replace_source_output(opset.add(source, amount).output(0))
    openvino.save_model(model, path.with_name("bad.xml"), compress_to_fp16=False)
    return path.with_name("bad.xml")


def shifted_onnx(path, place, amount):
    """Add a number to an output of an ONNX file."""
    model = onnx.load(path)
    output = model.graph.output[place].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
        node.input[:] = ["before" if name == output else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(amount), "amount"))
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "amount"], [output]))
    onnx.save(model, path.with_name("bad.onnx"))
    return path.with_name("bad.onnx")


@pytest.mark.parametrize(
    ("target", "name", "shifted"),
    [("openvino", "model.xml", shifted_ir), ("onnxruntime", "model.onnx", shifted_onnx)],
    ids=["openvino", "onnxruntime"],
)
def test_a_later_output_that_is_wrong_is_a_finding(target, name, shifted, tmp_path):
    qmodel, batches = quantized(Heads(), IMAGE, target=target)
    path = he.export(qmodel, tmp_path / name)
    report = he.verify(qmodel, path, batches, timed=False)
    assert [output.name for output in report.outputs] == ["detection_0", "detection_1", "scores"]
    assert [output.equal for output in report.outputs] == [1.0, 1.0, 1.0]
    assert [output.count for output in report.outputs] == [12 * 4 * 36, 12, 60]
    assert report.output_difference == 0.0
    assert report.findings == []
    assert 0 < report.outputs[0].quantization_error < 0.1
    wrong = he.verify(qmodel, shifted(path, 2, np.float32(0.5)), batches, timed=False)
    assert wrong.integer_match == 1.0
    assert [output.difference > 0.1 for output in wrong.outputs] == [False, False, True]
    assert wrong.output_difference == wrong.outputs[2].difference
    assert wrong.outputs[2].equal == 0.0
    (finding,) = [finding for finding in wrong.findings if "exact simulation" in finding]
    assert '"scores" differs from the exact simulation' in finding
    assert "".join(finding.split()) in "".join(str(wrong).split())
    assert finding in problems_of(wrong, 0.9999, allow_float=False)
    assert "detection_0" in str(wrong)
    moved = he.verify(qmodel, shifted(path, 1, np.int64(1)), batches, timed=False)
    (finding,) = moved.findings
    assert finding.startswith('100 % of the values of the output "detection_1" differ from the exact simulation')


class Forms(nn.Module):
    """Inputs in a dict, one of them a number without axes; the first output is empty, others are not float32."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, parts, factor):
        y = self.last((torch.relu(self.a(parts["a"])) - 2 * torch.relu(self.b(parts["b"]))) * factor)
        return {"none": y[:, :0], "half": y.half(), "index": y.argmax(1)}


@pytest.mark.parametrize(("target", "name"), [("openvino", "model.xml"), ("onnxruntime", "model.onnx")])
def test_inputs_in_dicts_and_outputs_without_values(target, name, tmp_path):
    """The entries of a dict may come in another order than the example's."""
    a, b, factor = torch.randn(4, 8), torch.randn(4, 8), torch.tensor(1.5)
    example = {"parts": {"b": b, "a": a}, "factor": factor}
    turned = {"parts": {"a": a, "b": b}, "factor": factor}
    qmodel = he.calibrate(he.prepare(Forms().eval(), example, target=target, scheme=SCHEME), [example])
    path = he.export(qmodel, tmp_path / name)
    expected = he.exact(qmodel)(**example)
    run = he.load_deployed(path, qmodel=qmodel)
    for batch in (example, turned):
        report = he.verify(qmodel, path, [batch], timed=batch is turned)
        assert (report.integer_match, report.findings, report.samples) == (1.0, [], 4)
        assert [output.equal for output in report.outputs] == [1.0, 1.0, 1.0]
        for found in (he.exact(qmodel)(**batch), run(**batch), run(batch["parts"], factor)):
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(VerificationError, match=r'"parts" of .* holds 1 values, and the example .* 2'):
        run({"a": a}, factor)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_a_file_of_something_that_was_not_trained_is_a_finding(target, tmp_path, monkeypatch):
    """File and exact simulation come from one deployed form: where that is wrong, only the float simulation tells."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    qmodel, batches = quantized(net, IMAGE, target=target)
    deployed_form = deploy.deployed_form

    def wrong(model):
        made = deployed_form(model)
        with torch.no_grad():
            made.get_submodule("2").bias += 0.1
        return made

    monkeypatch.setattr(deploy, "deployed_form", wrong)
    path = he.export(qmodel, tmp_path / f"model.{'xml' if target == 'openvino' else 'onnx'}")
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1.0
    assert report.output_difference < 1e-6
    (finding,) = report.findings
    assert 'of the integers of "3_relu" differ from the float simulation' in finding
    moved = {tensor.name: tensor.different_float_alone / tensor.count for tensor in report.tensors}
    assert moved["1_relu"] < 0.01
    assert moved["3_relu"] > 0.2
    assert report.outputs[0].float_simulation_difference > report.outputs[0].quantization_error
    assert report.outputs[0].float_simulation_difference_alone < 1e-3


def test_a_last_layer_that_was_not_trained_is_found_at_the_output(tmp_path, monkeypatch):
    qmodel, batches = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), IMAGE)
    deployed_form = deploy.deployed_form

    def wrong(model):
        made = deployed_form(model)
        with torch.no_grad():
            made.get_submodule("2").bias += 0.2
        return made

    monkeypatch.setattr(deploy, "deployed_form", wrong)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1.0
    assert ['the output "output" differs from the float simulation' in finding for finding in report.findings] == [True]


def test_an_overflow_is_named_before_the_differences_that_it_explains():
    output = OutputParity("y", 1, 0.0, 0.5, 0.5, 0.5, 0.5, 0.01, continuous=True, moved_by_quantization=0.0)
    parity = {"weights_match": True, "outputs": [output], "tensors": [], "integer_match": 0.9}
    for overflows in (True, False):
        _, found, _ = judged_session({**parity, "overflows": overflows}, dict, needed=False)
        assert found[0].startswith("This processor has no VNNI") is overflows
        assert "differs from the exact simulation" in found[int(overflows)]


Boxes = namedtuple("Boxes", ["left", "right"])


def test_outputs_bear_the_names_of_what_holds_them():
    x = torch.zeros(1)
    assert list(named_outputs(x)) == ["output"]
    assert list(named_outputs((x, [x, {"mask": x}], None, 3))) == ["output_0", "output_1_0", "output_1_1_mask"]
    assert list(named_outputs({"boxes": Boxes(x, x), "aux": (x,)})) == ["boxes_left", "boxes_right", "aux_0"]


def test_differences_of_values_that_are_no_numbers_count():
    sums = OutputSums("y")
    infinite = torch.tensor([1.0, float("inf"), float("nan")])
    sums.add(infinite, infinite, infinite, infinite, infinite)
    assert (sums.result().equal, sums.result().difference) == (1.0, 0.0)
    sums.add(infinite, torch.ones(3), infinite, infinite, infinite)
    assert sums.result().equal == pytest.approx(4 / 6)
    assert sums.result().difference == float("inf")

    overflowing, one = OutputSums("y"), torch.ones(1)
    overflowing.add(torch.tensor([float("inf")]), one, one, one, one)
    assert overflowing.result().difference == float("inf")


def test_outputs_of_another_number_or_shape_are_an_error():
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    with pytest.raises(VerificationError, match=r"has 1 outputs and the model 2 \(a, b\).*Export the model again"):
        in_form_of(expected, [torch.zeros(2, 3)], "model.xml")
    with pytest.raises(VerificationError, match=r'"b" of model.xml has shape \[4\].*\[2\].*Export the model again'):
        in_form_of(expected, [torch.zeros(2, 3), torch.zeros(4)], "model.xml")


def test_a_file_of_a_network_of_another_width_is_refused(tmp_path):
    """Its tensors bear the same names."""

    def net(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))

    (narrow, batches), (wide, _) = quantized(net(4), IMAGE), quantized(net(8), IMAGE)
    path = he.export(wide, tmp_path / "model.xml")
    with pytest.raises(
        VerificationError, match=r"1_relu has shape \[4, 8, 6, 6\] in .*, and \[4, 4, 6, 6\] in the model"
    ):
        he.verify(narrow, path, batches, timed=False)


def judged(outputs, labels, axis="auto"):
    answers = Answers(axis)
    answers.add({"deployed": outputs, "exact": outputs, "simulated": outputs}, labels)
    return answers


def one_hot(labels, classes, axis):
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, axis).float()


@pytest.mark.parametrize(
    ("shape", "axis"), [((6,), 1), ((6, 5), -1), ((6, 4), 1), ((6, 4, 4), 1), ((6, 3, 4), -1)], ids=str
)
def test_the_axis_of_the_classes_is_the_one_that_labels_lack(shape, axis):
    labels = torch.randint(0, 5, shape)
    answers = judged({"y": one_hot(labels, 5, axis)}, labels)
    assert answers.accuracy() == {"simulated": 100.0, "deployed": 100.0}
    assert answers.total == labels.numel()
    assert answers.notes() == []


def test_without_labels_tokens_have_their_classes_last():
    assert judged({"y": torch.zeros(2, 7, 5)}, None).total == 14
    assert judged({"y": torch.zeros(2, 5, 7, 7)}, None).total == 98
    assert judged({"y": torch.zeros(2, 7, 5)}, None, axis=1).total == 10


def test_labels_judge_the_output_that_they_fit():
    labels = torch.tensor([0, 2, 1])
    answers = judged({"features": torch.randn(3, 8, 4, 4), "logits": one_hot(labels, 3, 1)}, labels)
    assert answers.judged == "logits"
    assert answers.accuracy()["deployed"] == 100.0
    assert judged({"classes": labels}, labels).accuracy()["deployed"] == 100.0


def test_labels_that_are_no_class_are_left_out_and_counted():
    labels = torch.tensor([[0, 1, -100], [2, 255, -100]])
    answers = judged({"y": one_hot(labels.clamp(0, 2), 3, -1)}, labels)
    assert answers.accuracy()["deployed"] == 100.0
    assert answers.labelled == 3
    assert answers.notes() == ["accuracies leave out 3 labels that are no class of the output"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.zeros(4, 7, dtype=torch.int64), r"labels of shape \[4, 7\] fit no output .*y \[4, 5\]"),
        (torch.zeros(4), r"labels are float32 of shape \[4\], not a tensor of indices"),
        ([{"boxes": torch.zeros(1, 4)}], "labels are a list, not a tensor of indices"),
        (torch.zeros(4, 5, dtype=torch.int64), "a single value for each label"),
    ],
    ids=["shape", "floats", "list", "values"],
)
def test_accuracy_is_never_dropped_without_a_word(labels, reason):
    answers = judged({"y": torch.zeros(4, 5)}, labels)
    assert answers.accuracy() == {}
    (note,) = answers.notes()
    assert note.startswith("no accuracy: ")
    assert re.search(reason, note)


@pytest.mark.parametrize(
    ("key", "accuracy", "notes"),
    [
        *[(key, True, 0) for key in ("y", "targets", "label_ids", "class_labels")],
        *[(key, False, 1) for key in ("class_id", "index", 0)],
    ],
)
def test_the_label_of_a_dict_is_found_or_missed_aloud(key, accuracy, notes, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)), torch.randn(4, 8)
    qmodel = he.calibrate(he.prepare(model, {"input": x}, scheme="w7a8"), [x])
    path = he.export(qmodel, tmp_path / "m.xml")
    report = he.verify(qmodel, path, [{"input": x, key: torch.tensor([0, 1, 2, 3])}], timed=False)
    assert bool(report.accuracy) == accuracy
    found = [note for note in report.notes if f"({key})" in note]
    assert len(found) == notes


def test_a_single_logit_is_no_choice_of_classes():
    """Its largest value is always the first: every sample of class 0 would be right, and each answer the same."""
    logits, others = torch.tensor([[2.0], [-3.0], [4.0]]), torch.tensor([[2.0], [3.0], [4.0]])
    for labels in (torch.tensor([0, 1, 1]), torch.tensor([[0], [1], [1]])):
        answers = Answers()
        answers.add({"deployed": {"y": logits}, "exact": {"y": logits}, "simulated": {"y": others}}, labels)
        assert answers.accuracy() == {}
        assert 'the output "y" has a single value for each label' in answers.notes()[0]
        assert (answers.total, answers.same_exact, answers.same_float) == (3, 3, 2)


def test_what_a_model_raises_of_a_batch_is_an_error_that_names_the_batch(tmp_path):
    ids = torch.randint(8, (2, 6))
    qmodel = he.calibrate(he.prepare(nn.Sequential(nn.Embedding(8, 12), nn.Linear(12, 4)), ids), [ids])
    path = he.export(qmodel, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match=r"Batch 1 could not be compared.*\n.*Give batches as for") as raised:
        he.verify(qmodel, path, [ids, torch.full((2, 6), 99)], timed=False)
    assert isinstance(raised.value.__cause__, IndexError)


def test_a_size_that_is_not_free_names_the_batch(tmp_path):
    qmodel, batches = quantized(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (2, 3, 2, 2))
    path = he.export(qmodel, tmp_path / "model.onnx")
    wrong = [batches[0], torch.randn(2, 3, 4, 4)]
    for call in (lambda: he.verify(qmodel, path, wrong, timed=False), lambda: he.calibrate(qmodel, wrong)):
        with pytest.raises(InputError, match=r"Batch 1 \(counted from 0\): .*has 4 at axis 2"):
            call()


def test_a_folder_that_takes_no_file_is_named_without_advice_about_operators(tmp_path):
    qmodel, _ = quantized(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (2, 3, 2, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(he.HalfevenError, match="file") as raised:
        he.export(qmodel, tmp_path / "file" / "model.xml")
    assert "leave_out" not in str(raised.value)


def test_roundings_that_spread_are_explained():
    """A network with random weights equals the float simulation in 80 % of its integers, and nothing is wrong."""
    first = TensorParity("first", count=9000, different_float=20, different_float_alone=20)
    last = TensorParity("last", count=1000, different_float=900, different_float_alone=2)
    (note,) = spread_notes([first, last])
    assert "0.22 % of the integers differ" in note
    assert "9.2 % in the whole model" in note
    assert "random weights" in note
    assert spread_notes([first]) == []
    wrong = dataclasses.replace(last, different_float_alone=900)  # a layer that computes something else
    assert spread_notes([first, wrong]) == []
    assert spread_notes([]) == []
