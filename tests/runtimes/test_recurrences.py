"""A recurrent layer is one sequence operator in a file for OpenVINO, with the numbers that PyTorch computes."""

from collections import Counter

import openvino
import pytest
import torch
from torch import Tensor, nn

import halfeven as he
from halfeven.errors import ExportError, HalfevenError
from halfeven.runtimes.onnxruntime.session import ONNXRuntimeFile
from runtimes.parity import SCHEME
from sweeps import sweep


class Recurrent(nn.Module):
    """A recurrent layer between linear ones, whose outputs and last states are read."""

    def __init__(self, kind, **options):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.r = kind(8, 13 if "proj_size" in options else 12, **options)
        self.b = nn.Linear(24 if options.get("bidirectional") else 12, 4)

    def forward(self, x):
        y, states = self.r(self.a(x))
        return self.b(y), *(states if isinstance(states, tuple) else (states,))


@pytest.mark.parametrize(
    ("kind", "options", "operators"),
    [
        (nn.GRU, {"bidirectional": True, "batch_first": True}, {"GRUSequence": 1}),
        pytest.param(nn.GRU, {"num_layers": 2, "bias": False}, {"GRUSequence": 2}, marks=pytest.mark.exhaustive),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}, {"LSTMSequence": 2}),
        pytest.param(
            *(nn.RNN, {"nonlinearity": "relu", "batch_first": True}, {"RNNSequence": 1}), marks=pytest.mark.exhaustive
        ),
    ],
)
def test_each_layer_is_one_operator(kind, options, operators, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    qmodel = he.calibrate(he.prepare(Recurrent(kind, **options).eval(), x, scheme=SCHEME), [x])
    path = he.export(qmodel, tmp_path / "model.xml")
    kinds = Counter(node.get_type_name() for node in openvino.Core().read_model(path).get_ordered_ops())
    assert {name: count for name, count in kinds.items() if name.endswith("Sequence")} == operators
    outputs = he.load_deployed(path)(x)
    for found, expected in zip(outputs, qmodel(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    report = he.verify(qmodel, path, [x], timed=False)
    assert report.integer_match == 1
    assert not report.findings


@pytest.mark.parametrize("kind", sweep([nn.LSTM, nn.GRU], nn.LSTM))
def test_onnx_runtime_orders_the_weights_of_gates_once(kind, tmp_path):
    """Not in each run: a third of the time of a tagger on 64 words."""
    model = Recurrent(kind, bidirectional=True, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    qmodel = he.calibrate(he.prepare(model, x, scheme=SCHEME, target="onnxruntime"), [x])
    nodes = list(ONNXRuntimeFile(he.export(qmodel, tmp_path / "model.onnx"))._optimized())
    made = {name for node in nodes for name in node.output}
    (recurrence,) = (node for node in nodes if node.op_type in ("LSTM", "GRU"))
    assert made.isdisjoint(recurrence.input[1:4])
    assert he.verify(qmodel, tmp_path / "model.onnx", [x], timed=False).integer_match == 1


@pytest.mark.parametrize(("target", "kind"), [("openvino", nn.LSTM), ("onnxruntime", nn.GRU)])
def test_sequences_of_any_length(target, kind, tmp_path):
    torch.manual_seed(0)
    model = Recurrent(kind, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2).eval()
    batches = [torch.randn(3, 5, 8), torch.randn(2, 11, 8), torch.randn(1, 3, 8)]
    qmodel = he.prepare(model, batches[0], scheme=SCHEME, target=target, dynamic_shapes={"x": {1: "steps"}})
    he.calibrate(qmodel, batches)
    path = he.export(qmodel, tmp_path / ("model.xml" if target == "openvino" else "model.onnx"))
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1
    assert not report.findings


@pytest.mark.parametrize(
    ("kind", "ending", "reason"),
    [
        (nn.RNN, "onnx", "an RNN whose number of steps is free"),
        (nn.LSTM, "onnx", "an LSTM with projections"),
        (nn.LSTM, "xml", "an LSTM with projections"),
    ],
)
def test_what_no_operator_computes_is_refused(kind, ending, reason, tmp_path):
    target = {"onnx": "onnxruntime", "xml": "openvino"}[ending]
    options = {"proj_size": 12, "batch_first": True} if kind is nn.LSTM else {"batch_first": True}
    model = Recurrent(kind, **options).eval()
    x = torch.randn(2, 5, 8)
    qmodel = he.calibrate(he.prepare(model, x, target=target, dynamic_shapes={"x": {1: "steps"}}), [x])
    with pytest.raises(ExportError, match=reason):
        he.export(qmodel, tmp_path / f"m.{ending}")


class Packed(nn.Module):
    """Reads texts of several lengths, without their padding."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.r, self.b = nn.Linear(8, 8), kind(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x, lengths):
        pack = nn.utils.rnn.pack_padded_sequence
        states = self.r(pack(self.a(x), lengths, batch_first=True, enforce_sorted=False))[1]
        return self.b(states[-1] if isinstance(states, Tensor) else states[0][-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, pytest.param(nn.RNN, marks=pytest.mark.exhaustive)])
def test_packed_sequences_stay_in_python_with_their_line_and_a_remedy(kind, tmp_path):
    example = torch.randn(3, 5, 8), torch.tensor([2, 5, 3])
    qmodel = he.calibrate(he.prepare(Packed(kind).eval(), example, scheme=SCHEME), [example])
    whole, layer, *_ = he.plan_of(qmodel).notes
    assert "packed sequence (pack_padded_sequence)" in whole
    assert "states = self.r(pack(" in whole
    assert layer.startswith("Stays Python, in float: r: CaptureError: The sizes in a packed sequence")
    with pytest.raises(HalfevenError, match=r"no file\. Run the recurrent layer on the padded batch"):
        he.export(qmodel, tmp_path / "m.xml")
