"""`halfeven search`: what it judges plans by, and what it leaves in its folder."""

import json
import re
import sys

import pytest

import halfeven as he
from faults.tiny_run import write_configs
from halfeven import pipelines
from halfeven.cli import quantization_run, search
from halfeven.cli.main import main
from halfeven.mixed_precision.result_page import search_contents

pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write_configs(tmp_path)
    sys.modules.pop("faulty_net", None)


def test_plans_are_judged_on_held_out_training_samples_and_reported_on_the_others(
    config, tmp_path, monkeypatch, capsys
):
    captured = []
    capture = pipelines.capture_for_quantization
    monkeypatch.setattr(pipelines, "capture_for_quantization", lambda *given: captured.append(given) or capture(*given))
    folder = tmp_path / "work"
    options = ("--pretraining.epochs", "0", "--search.tensors", "1", "--search.max-drop", "0", "--no-train")
    data = ("--data.selection", "holdout", "--data.holdout-share", "0.25")
    main(["search", str(config), "--work-dir", str(folder), *options, *data])
    assert "Plans are judged on the 12 held-out training samples." in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["search"]["judged_on"] == "12 held-out training samples"
    assert len(captured) == 2, "the model that was checked is searched; the checkpoint is loaded for its file"
    assert (folder / "plan.txt").is_file()
    pytest.importorskip("vl_convert")
    page = (folder / "report.html").read_text()
    shown = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [plan["number"] for plan in shown["plans"]] == [step["number"] for step in results["search"]["steps"]]
    assert len(shown["tables"]["Plans of the search"]) == 1 + len(shown["plans"])
    assert shown["accuracy"].keys() == {"float", "simulated", "deployed"}


@pytest.mark.parametrize(("max_drop", "trains"), [(1.0, True), (2.0, False), (None, False)])
def test_training_follows_where_the_drop_is_too_large_and_not_where_another_budget_is_missed(max_drop, trains):
    assert search._loses_too_much({"reached": False, "drop": {"drop": 1.5, "interval": None}}, max_drop) == trains


def test_a_page_shows_which_plan_was_chosen_and_its_lines_to_paste():
    cost = {"bits": 4.0, "bops": 1.0, "moved": 1.0, "size": 2000.0, "tensors": 0, "latency": None, "work": 2.0}
    step = {"number": 0, "unit": "", "change": "", "reason": "", "divergence": 0.2, "gain": 0.0, "judgement": None}
    better = {**step, "number": 1, "unit": "conv", "change": "float", "divergence": 0.1}
    found = {
        "reached": True, "chosen": 1, "rules": [{"pattern": "conv", "quantize": False, "kind": None}],
        "unit": "drop of the metric", "drop": {"drop": 0.5, "interval": 0.1}, "latency": None,
        "steps": [{**step, "cost": cost}, {**better, "cost": {**cost, "work": 3.0}}], "pareto": [0, 1], "notes": [],
    }  # fmt: skip
    contents = search_contents(found, {})
    assert [(plan["kind"], plan["cost"]) for plan in contents.plans] == [
        ("Pareto", 1.0), ("chosen", 1.5)
    ]  # fmt: skip
    assert "All budgets are kept after 1 of 1 steps, drop of the metric 0.5 ± 0.1" in contents.verdict
    assert eval(f"dict({contents.paste})", {"Rule": he.Rule}) == {"rules": (he.Rule(pattern="conv", quantize=False),)}


def test_the_float_model_is_not_trained_again_for_the_training_from_a_plan(config, tmp_path, monkeypatch):
    from halfeven.cli import train

    trained = []
    once = quantization_run.train_float
    monkeypatch.setattr(
        quantization_run, "train_float", lambda *given, **how: trained.append(how) or once(*given, **how)
    )
    monkeypatch.setattr(train, "train_float", lambda *given, **how: trained.append(how))
    monkeypatch.setattr(train, "deliver", lambda *given, **how: None)
    monkeypatch.setattr(search, "_loses_too_much", lambda *given: True)
    options = ("--search.tensors", "0", "--training.epochs", "1")
    main(["search", str(config), "--work-dir", str(tmp_path / "work"), *options])
    assert trained == [{"resume": False}, {"resume": True}]
