"""benchmarks/gpu.py: it refuses in one sentence without CUDA, and its parts run on the CPU with small networks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from processes import run

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_and_exits_with_2():
    done = run([sys.executable, SCRIPT])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "There is no CUDA device here" in done.stderr


@pytest.mark.exhaustive
def test_every_part_runs_on_the_cpu(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--json", tmp_path / "found.json"]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())
    parts = {row["part"] for row in rows}
    assert parts >= {"machine", "parity of kernels", "parity of models", "step", "step, compiled", "two processes"}
    assert not any("failed" in row or row.get("agree") is False for row in rows)
    assert {row["precision"] for row in rows if row["part"] == "TensorRT"} == {"f32", "runtime"}
    (together,) = (row for row in rows if row["part"] == "two processes")
    assert together["tensors that differ"] == []
