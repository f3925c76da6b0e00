"""JSON that halfeven writes: any language reads it."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.checkpoint import read_facts
from halfeven.cli.results import write_json
from halfeven.cli.run_record import as_json
from halfeven.files import json_text
from halfeven.tasks.task import read_metrics
from halfeven.training.progress import JSONLinesTracker

NOT_FINITE = {"top1": math.nan, "nested": [math.inf, {"low": -math.inf}]}


def strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_null_stands_for_nan_and_infinities_and_numbers_of_arrays_are_numbers():
    found = strict(json_text({**NOT_FINITE, "numpy": np.float32(0.5), "torch": torch.tensor(2), 3: (True, None)}))
    assert found == {
        "top1": None, "nested": [None, {"low": None}], "numpy": 0.5, "torch": 2, "3": [True, None]
    }  # fmt: skip
    assert math.isnan(read_metrics({"top1": None})["top1"])


def test_results_logs_records_and_checkpoints_hold_no_nan(tmp_path):
    write_json(tmp_path / "results.json", NOT_FINITE)
    strict((tmp_path / "results.json").read_text())
    tracker = JSONLinesTracker(tmp_path, purge_step=0)
    tracker.start()
    tracker.log({"loss": math.nan}, 1)
    tracker.finish()
    strict((tmp_path / "log.jsonl").read_text())
    assert as_json(NOT_FINITE) == as_json(NOT_FINITE), "a run with such an option can be resumed"
    qmodel = he.calibrate(he.prepare(nn.Linear(3, 2), torch.zeros(2, 3)), [torch.randn(4, 3)])
    he.save(qmodel, tmp_path / "model.safetensors", NOT_FINITE)
    assert read_facts(tmp_path / "model.safetensors")["extra"]["top1"] is None
