"""Processors without VNNI: 8-bit weights saturate there, 7-bit ones do not. oneDNN can be told to be such a one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, torch
from torch import nn
import halfeven as he
torch.manual_seed(0)
layers = [layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *layers).eval()
x = torch.rand(4, 3, 16, 16)
qmodel = he.calibrate(he.prepare(model, x, scheme=sys.argv[1]), [x]).eval()
report = he.verify(qmodel, he.export(qmodel, sys.argv[2]), [x], timed=False)
print(report)
print(json.dumps([report.integer_match, report.integer_layers, report.quantizable_layers, report.overflows]))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
@pytest.mark.parametrize(("scheme", "exact"), [("w7a8", True), ("w8a8", False)])
def test_weights_of_7_bits_are_exact(isa, scheme, exact, tmp_path):
    paths = os.pathsep.join((str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": paths, "HALFEVEN_COMPILE": "0"}
    command = [sys.executable, "-c", CODE, scheme, str(tmp_path / "model.xml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, values = done.stdout.strip().splitlines()
    match, integer, layers, overflows = json.loads(values)
    assert integer == layers == 4
    assert (match == 1.0) is exact
    assert overflows is not exact
    assert any("this processor has no VNNI" in line for line in said) is not exact
