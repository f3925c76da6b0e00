"""`load_deployed`: threads, names, wrong inputs, what a runtime says about its user, and files of more than 2 GB."""

import os
import sys
import threading

import onnx
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError, VerificationError
from halfeven.runtimes.onnx import external_data
from processes import run
from runtimes.parity import quantized

FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image, *, weight):
        return {"y": self.b((torch.relu(self.a(image)) * weight[:, None, None, None]).mean((2, 3)))}


@pytest.fixture(scope="module", params=sorted(FILES))
def served(request, tmp_path_factory):
    torch.manual_seed(0)
    batches = [{"image": torch.randn(4, 3, 24, 24), "weight": torch.rand(4) + 0.5} for _ in range(4)]
    qmodel = he.quantize(TwoInputs().eval(), batches, target=request.param, scheme="w7a8")
    path = he.export(qmodel, tmp_path_factory.mktemp("served") / FILES[request.param])
    return qmodel, path, request.param, batches


def test_each_thread_gets_the_results_of_its_own_inputs(served):
    qmodel, path, target, batches = served
    run = he.load_deployed(path, target, qmodel)
    expected = [run(**batch)["y"] for batch in batches]
    assert not torch.equal(expected[0], expected[1])
    results = [[] for _ in batches]
    errors = []
    start = threading.Barrier(len(batches))

    def serve(number):
        try:
            start.wait()
            for _ in range(60):
                results[number].append(run(**batches[number])["y"])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [len(found) for found in results] == [60] * 4
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(y, right) for y in found)


def test_inputs_that_a_file_does_not_take_are_refused_with_a_reason(served):
    qmodel, path, target, batches = served
    run = he.load_deployed(path, target, qmodel)
    image, weight = batches[0]["image"], batches[0]["weight"]
    assert torch.equal(run(image, weight)["y"], run(weight=weight, image=image)["y"])
    with pytest.raises(VerificationError, match=r"takes the inputs image, weight, and was given .*image"):
        run(image=image)
    with pytest.raises(VerificationError, match=r"was given .* wait"):
        run(image=image, wait=weight)
    with pytest.raises(VerificationError, match=r'input "weight" of .* is a list'):
        run(image=image, weight=[1.0])
    with pytest.raises(VerificationError, match=r"cannot run .*\[4, 5, 24, 24\].* It takes .*") as raised:
        run(image=torch.randn(4, 5, 24, 24), weight=weight)
    assert raised.value.__cause__ is not None
    with pytest.raises(VerificationError, match=r"cannot run .*float64"):
        he.load_deployed(path, target)(image.double(), weight.double()[:, None])


@pytest.mark.parametrize("target", sorted(FILES))
def test_numbers_in_the_place_of_indices_are_refused(target, tmp_path):
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    ids = torch.randint(9, (2, 3))
    path = he.export(he.quantize(net, [ids], target=target), tmp_path / FILES[target])
    with pytest.raises(VerificationError, match=r"int64|i64"):
        he.load_deployed(path)(ids + 0.9)


def test_what_openvino_cannot_compile_is_an_error_that_keeps_the_cause(served, tmp_path, monkeypatch):
    _, path, target, _ = served
    if target != "openvino":
        return
    from halfeven.runtimes.openvino import session

    class Broken:
        def compile_model(self, *args):
            raise RuntimeError("Check failed at graph.cpp:12:\nno kernel for Roll")

    model = session.read(path)
    monkeypatch.setattr(session, "_core", Broken)
    with pytest.raises(VerificationError, match="cannot compile it: no kernel for Roll So it cannot be run") as raised:
        session.compile_model(model)
    assert "graph.cpp" in str(raised.value.__cause__)


def test_neither_runtime_reports_anything(tmp_path):
    """In a process of its own, which is no job of continuous integration: nothing is kept about the device or what
    ran, and nothing is sent."""
    code = """
import os
from openvino_telemetry.utils.sender import TelemetrySender
sent = []
TelemetrySender.send = lambda self, backend, message: sent.append(message)
import torch, halfeven as he
from torch import nn
for target, name in (("openvino", "model.xml"), ("onnxruntime", "model.onnx")):
    qmodel = he.quantize(nn.Linear(3, 4), [torch.randn(2, 3)], target=target)
    path = he.export(qmodel, name)
    he.verify(qmodel, path, [torch.randn(2, 3)], timed=False)
    he.load_deployed(path, target)(torch.randn(2, 3))
assert "CI" not in os.environ
print(len(sent), "messages")
"""
    home, temporary, work = (tmp_path / name for name in ("home", "temporary", "work"))
    for folder in (home, temporary, work):
        folder.mkdir()
    others = ("ORT_", "XDG_", "CI", "TF_BUILD", "JENKINS_URL")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    ours |= {"HOME": str(home), "TMPDIR": str(temporary), "HALFEVEN_COMPILE": "0"}
    done = run([sys.executable, "-c", code], cwd=work, env=ours)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("0 messages")
    assert [path for folder in (home, temporary) for path in folder.rglob("*") if path.is_file()] == []


def test_who_wants_telemetry_keeps_it(monkeypatch):
    from halfeven.runtimes.onnx.file import onnxruntime

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_tensors_too_many_for_one_file_lie_beside_it(target, tmp_path, monkeypatch):
    monkeypatch.setattr(external_data, "LARGEST_PROTO", 3000)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 9)
    )
    qmodel, batches = quantized(net, (2, 3, 8, 8), target=target)
    path = he.export(qmodel, tmp_path / "folder" / "model.onnx")
    assert sorted(part.name for part in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    stored = onnx.load(path, load_external_data=False).graph.initializer
    assert any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored)
    report = he.verify(qmodel, path, batches, timed=target == "onnxruntime")
    assert report.weights_match
    assert report.integer_match == 1.0 or target == "tensorrt"
    assert report.integer_layers == 3
    assert he.load_deployed(path, target)(batches[0]).shape == (2, 9)
    path.with_name("model.onnx.data").unlink()
    with pytest.raises(VerificationError, match="not a complete ONNX file"):
        he.load_deployed(path, target)


def test_a_file_is_run_and_verified_by_the_runtime_that_it_was_written_for(tmp_path):
    """Several runtimes read ONNX: OpenVINO has no operator for ONNX Runtime's SiLU, and would run others as floats."""
    qmodel, batches = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)), (2, 3, 8, 8))
    path = he.export(qmodel, tmp_path / "model.onnx", target="onnxruntime")
    report = he.verify(qmodel, path, batches, timed=False)
    assert (report.runtime, report.findings) == ("ONNX Runtime", [])
    assert torch.equal(he.load_deployed(path)(batches[0]), he.load_deployed(path, "onnxruntime")(batches[0]))
    for call in (
        lambda: he.load_deployed(path, "openvino"),
        lambda: he.verify(qmodel, path, batches, target="openvino"),
    ):
        with pytest.raises(ConfigError, match=r"written for onnxruntime.*target names openvino.*Leave target out"):
            call()


def test_the_ending_tells_the_runtime_of_a_file_that_one_alone_reads(tmp_path):
    qmodel, batches = quantized(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (2, 3, 2, 2), target="onnxruntime")
    path = he.export(qmodel, tmp_path / "model.xml", target="openvino")
    assert he.verify(qmodel, path, batches, timed=False).runtime == "OpenVINO"
    path.with_suffix(".bin").unlink()
    with pytest.raises(VerificationError, match=r"has its weights in model\.bin, which is not beside it.*Copy both"):
        he.load_deployed(path)
