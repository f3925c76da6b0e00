"""The log of a run: lines and curves, what a resumed run drops of them, and that one process alone writes."""

import io
import json

import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from halfeven.training.progress import JSONLinesTracker, RunLog


def written(folder, *, first, losses, resumed=False, main=True):
    console = Console(file=io.StringIO())
    log = RunLog(folder, "Training", total=9, step=first, resumed=resumed, console=console, main=main)
    for step, loss in enumerate(losses, first + 1):
        log.advance(step, samples=4)
        log.training(step, 1, loss, 0.1)
    log.close()


def test_a_resumed_run_drops_lines_and_curves_of_later_steps(tmp_path):
    written(tmp_path, first=0, losses=[5.0, 4.0, 3.0, 2.0])
    written(tmp_path, first=2, losses=[30.0], resumed=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 5.0), (2, 4.0), (3, 30.0)]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("training/loss")] == [(1, 5.0), (2, 4.0), (3, 30.0)]


def test_a_line_cut_short_by_the_interruption_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    tracker = JSONLinesTracker(tmp_path, purge_step=2)
    tracker.start()
    tracker.log({"loss": 1.0}, 2)
    tracker.finish()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_only_the_main_process_writes(tmp_path):
    written(tmp_path, first=0, losses=[1.0], main=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_starts_anew_drops_the_log_before(tmp_path):
    written(tmp_path, first=0, losses=[5.0, 4.0])
    written(tmp_path, first=0, losses=[3.0])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0)]


def test_float_and_quantized_accuracy_are_in_one_chart_and_scales_in_histograms(tmp_path):
    constants = {"float": {"top1": 90.0}}
    console = Console(file=io.StringIO())
    given = {"total": 2, "step": 0, "resumed": False, "console": console, "main": True}
    log = RunLog(tmp_path, "Training", constants=constants, **given)
    log.validation(0, 0, "float", constants["float"])
    for step, top1 in ((1, 80.0), (2, 85.0)):
        log.validation(step, step, "w4a4", {"top1": top1})
    log.histograms(2, {"scales": torch.tensor([1.0, 2.0])})
    log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("w4a4/top1")] == [(1, 80.0), (2, 85.0)]
    assert [(event.step, event.value) for event in curves.Scalars("float/top1")] == [(0, 90.0), (1, 90.0), (2, 90.0)]
    assert curves.Histograms("quantizers/scales")[0].histogram_value.num == 2
    layout = curves.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b".*/top1$" in layout
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum("float" in line for line in lines) == 1
