"""The snippets "Run the file" of the documentation compute what verify runs, and the default session is compared."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.runtimes.onnx.file import ACCURACY_LEVEL, WEIGHT_BIAS
from halfeven.verification.default_session import DefaultSession, default_session
from processes import run
from runtimes.parity import SCHEME

DOCS = Path(__file__).parents[2] / "docs" / "targets"
FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


def snippet(target, language="python"):
    """The code under "Run the file" of a runtime's page."""
    section = (DOCS / f"{target}.md").read_text().split("## Run the file", 1)[1].split("\n## ", 1)[0]
    return re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[1]


class Mixed(nn.Module):
    """A layer that a rule leaves in float between quantized tensors, which ONNX Runtime quantizes by default."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
        self.d = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        return self.d(torch.relu(self.c(x)))


@pytest.mark.parametrize("scheme", [SCHEME, "w8a16"])
@pytest.mark.parametrize("target", sorted(FILES))
def test_the_snippet_computes_what_verify_ran(target, scheme, tmp_path, monkeypatch):
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    weights_alone = scheme == "w8a16"
    rules = () if weights_alone else (he.Rule(pattern="b", quantize=False),)
    how = {"reconstruct": "off"} if weights_alone else {}
    qmodel = he.quantize(Mixed().eval(), batches, target=target, scheme=scheme, rules=rules, **how)
    path = he.export(qmodel, tmp_path / FILES[target])
    monkeypatch.chdir(tmp_path)
    names = {"images": batches[0].numpy()}
    exec(snippet(target), names)
    assert np.array_equal(names["logits"], he.load_deployed(path, target)(batches[0]).numpy())
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.findings == []
    assert report.default_session is not None
    assert "difference of the default session" in str(report)
    if target == "onnxruntime":
        assert report.default_session.settings == ([] if weights_alone else [WEIGHT_BIAS])
        assert (report.default_session.difference > 0) is not weights_alone


def mixed(target, folder):
    """A file with a layer in float, some images, and what `load_deployed` computes of them."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    rules = (he.Rule(pattern="b", quantize=False),)
    qmodel = he.quantize(Mixed().eval(), batches, target=target, scheme=SCHEME, rules=rules)
    path = he.export(qmodel, folder / FILES[target])
    return path, batches[0].numpy(), he.load_deployed(path, target)(batches[0]).numpy()


def test_the_entry_that_the_cpp_of_onnx_runtime_makes_is_the_setting(tmp_path):
    """The wheel has no headers to compile with, so the entry is made from Python."""
    path, images, expected = mixed("onnxruntime", tmp_path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        *re.search(r'AddConfigEntry\("(.*?)", "(.*?)"\)', snippet("onnxruntime", "cpp")).groups()
    )
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": images})[0], expected)


CPP_MAIN = """
#include <fstream>
#include <vector>

int main() {
    std::vector<float> values(4 * 3 * 8 * 8);
    const auto bytes = [](auto& held) { return reinterpret_cast<char*>(held.data()); };
    std::ifstream("images.bin", std::ios::binary).read(bytes(values), values.size() * sizeof(float));
    ov::Tensor logits = run(ov::Tensor(ov::element::f32, {4, 3, 8, 8}, values.data()));
    std::ofstream("logits.bin", std::ios::binary).write(static_cast<char*>(logits.data()), logits.get_byte_size());
}
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cpp_of_openvino_computes_what_load_deployed_does(tmp_path):
    _, images, expected = mixed("openvino", tmp_path)
    images.tofile(tmp_path / "images.bin")
    (tmp_path / "main.cpp").write_text(snippet("openvino", "cpp") + CPP_MAIN)
    package = Path(openvino.__file__).parent
    (library,) = (package / "libs").glob("libopenvino.so.*")
    command = [
        "g++",
        "-std=c++17",
        "main.cpp",
        f"-I{package}/include",
        library,
        f"-Wl,-rpath,{package}/libs",
        "-o",
        "main",
    ]
    for step in (command, ["./main"]):
        run(step, cwd=tmp_path, check=True)
    assert np.array_equal(np.fromfile(tmp_path / "logits.bin", np.float32).reshape(expected.shape), expected)


class File:
    """A file whose outputs are wrong by 1 for each setting of its own that is not made."""

    def __init__(self, settings, matter):
        self.settings, self.matter = settings, matter

    def run_with(self, settings, inputs):
        return [inputs[0] + len(set(self.matter) - set(settings))]


def test_the_settings_that_make_the_difference_are_named():
    x = torch.full((2,), 4.0)
    both = ["a=1", "b=2"]
    assert default_session(File([], []), [x], [x]) is None
    assert default_session(File(both, []), [x], [x]) == DefaultSession(0.0, [])
    assert default_session(File(both, ["b=2"]), [x], [x]) == DefaultSession(0.25, ["b=2"])
    assert default_session(File(both, both), [x], [x]) == DefaultSession(0.5, both)
    assert ACCURACY_LEVEL.count("=") == WEIGHT_BIAS.count("=") == 1
