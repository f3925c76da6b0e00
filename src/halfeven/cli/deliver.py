"""From a checkpoint to verified files: the end that training and post-training quantization share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checkpoint import read_facts
from halfeven.cli.report_pages import write_pages
from halfeven.cli.results import print_accuracies, write_json
from halfeven.cli.run import PLAN_FILE, RunContext
from halfeven.cli.work_folder import BEST_FILE, LAST_FILE, RESULTS_FILE
from halfeven.errors import ConfigError, VerificationError
from halfeven.files import write_atomically
from halfeven.pipelines import load
from halfeven.placement.insertion import plan_of
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import load_deployed, target_in_file
from halfeven.tasks.task import Metrics
from halfeven.verification.report import Report
from halfeven.verification.report_tables import REST
from halfeven.verification.verify import verify
from halfeven.zoo.options import DataOptions
from halfeven.zoo.parts import subset

LAST_ROW = "simulated, last"
"""Name of the last checkpoint's accuracy in the table and in the results."""


def deliver(
    context: RunContext,
    model: nn.Module,
    float_metrics: Metrics,
    facts: dict[str, Any] | None = None,
    *,
    calibrated: Metrics | None = None,
    json: str = "",
) -> None:
    """Export the best checkpoint, verify the files, and show the accuracy of all models.

    Args:
        context: the run.
        model: the float model.
        float_metrics: the float model's accuracy.
        facts: further entries of `results.json`.
        calibrated: the accuracy that the training started from; None: not known, or there was no training.
        json: a further file to write the results to; "" for none.
    """
    best = context.folder / BEST_FILE
    # Read from the file, so that the checkpoint as it is on the disk is exported and verified.
    qmodel = load(best, model.cpu(), context.datasets.example())
    reports = export_verified(context, qmodel, context.folder, RESULTS_FILE)
    before = {"calibrated": calibrated} if calibrated is not None else {}
    # A row for each model that there is, from float to deployed; the first metric of each goes on the page.
    rows = {"float": float_metrics, **before, "simulated": context.accuracy(qmodel)}
    files = {"simulated": best}
    last = context.folder / LAST_FILE
    if last.is_file():  # the run was a training
        rows[LAST_ROW] = _accuracy_of_last(context, model, rows["simulated"])
        files[LAST_ROW] = last
    for path in reports:
        name = "deployed" if len(reports) == 1 else f"deployed {path.suffix}"
        rows[name] = context.accuracy(load_deployed(path, None, qmodel), "cpu")
        files[name] = path
    print_accuracies(context, rows, files, _selection_caption(context) if last.is_file() else "")
    write_pages(context, qmodel, reports, rows, files, (facts or {}).get("search"))
    verification = {path.name: report.to_dict() for path, report in reports.items()}
    results = {**rows, **(facts or {}), "verification": verification}
    for path in (context.folder / RESULTS_FILE, *([Path(json)] if json else [])):
        write_json(path, results)


def _accuracy_of_last(context: RunContext, model: nn.Module, best: Metrics) -> Metrics:
    """Return the accuracy of the last checkpoint, which is measured only where it is not the best checkpoint too."""
    chosen, last = (read_facts(context.folder / name).get("extra", {}) for name in (BEST_FILE, LAST_FILE))
    if chosen == last:
        return best
    return context.accuracy(load(context.folder / LAST_FILE, model.cpu(), context.datasets.example()))


def _selection_caption(context: RunContext) -> str:
    said = f"{BEST_FILE} was chosen on the {context.selection}"
    if context.datasets.holdout is not None:
        return f"{said}, and not on these."
    return f'{said}, so its accuracy here is a little too good; "{LAST_ROW}" was not chosen.'


def write_plan(context: RunContext, qmodel: nn.Module) -> None:
    """Write the whole plan into the work folder; the console shows its summary."""
    if context.accelerator.is_main_process:
        text = f"{plan_of(qmodel).table()}\n"
        write_atomically(context.folder / PLAN_FILE, lambda partial: partial.write_text(text, encoding="utf-8"))


def target_of(context: RunContext, qmodel: nn.Module) -> str:
    """Return the runtime of the files: `export.target`, or else the runtime that the model was quantized for."""
    return given_target(context) or plan_of(qmodel).options.target


def given_target(context: RunContext) -> str | None:
    """Return the runtime that the user names for a file; None: the file says it itself."""
    target = context.experiment.export.target
    return None if target == "auto" else target


def check_replaceable(paths: Iterable[Path], target: str) -> None:
    """Refuse to replace a file for one runtime by a file of the same name for another.

    Raises:
        ConfigError: one of the files is there, for another runtime.
    """
    for path in paths:
        try:
            written_for = target_in_file(path)
        except VerificationError:  # a damaged file may be replaced
            continue
        if written_for not in (None, target):
            raise ConfigError(
                f"{path} is there already, for {written_for}, and would be replaced by a file for {target}. Give "
                "another --work-dir, or move the file."
            )


def export_verified(context: RunContext, qmodel: nn.Module, folder: Path, rest: str) -> dict[Path, Report]:
    """Write the files that the experiment names into a folder, and print the report of each.

    Args:
        context: the run.
        qmodel: the quantized model.
        folder: for the files.
        rest: the file that will have the whole reports.
    """
    target = target_of(context, qmodel)
    qmodel = qmodel.cpu().eval()
    reports = {}
    for ending in context.experiment.endings(target):
        path = folder / f"model{ending}"
        context.log(f"Exporting {path} ...")
        facts = preprocessing(context.experiment.data)
        export(qmodel, path, target, metadata=facts, float_precision=context.experiment.export.float_precision)
        reports[path] = verify_file(context, qmodel, path, rest)
    return reports


def preprocessing(data: DataOptions) -> dict[str, str]:
    """Return how a data set's inputs are made, for the metadata of files; {} where only the user's code knows."""
    values = f"RGB from 0 to 1, minus {list(data.mean)}, divided by {list(data.std)}"
    side = f"{data.image_size} x {data.image_size} pixels"
    fit = "fit into" if data.keep_aspect else "fill"
    padded = "; zeros on the right and below" if data.keep_aspect else ""
    scaling = "scaled (bilinear, antialiased) to"
    scaled = f"{scaling} {fit} {side}; {values}{padded}"
    said = {
        "image_folder": f"short side {scaling} {data.resize} pixels; the middle {side}; {values}",
        "voc_segmentation": scaled,
        "coco_detection": scaled,
        "shapes": f"{side}; {values}",
        "texts": f"tokens of {data.text.tokenizer}, padded to {data.text.max_length}",
    }
    return {"preprocessing": said[data.source]} if data.source in said else {}


def verify_file(context: RunContext, qmodel: nn.Module, path: Path, rest: str) -> Report:
    """Verify a file on validation samples, in its runtime, and print the report.

    Args:
        context: the run.
        qmodel: the model that the file was written from.
        path: the file.
        rest: what has the figures that the printed summary leaves out.
    """
    options = context.experiment.export
    validation = context.datasets.validation
    samples = subset(validation, list(range(min(options.verify_samples, len(validation)))))
    context.log(f"Verifying {path} on {len(samples)} samples ...")
    loader = context.loader(samples, shared=False, batch_size=options.verify_batch_size)
    report = verify(
        qmodel.cpu().eval(),
        path,
        [inputs for inputs, _ in loader],
        target=given_target(context),
        class_axis=context.task.class_axis,
        timed=options.timed,
    )
    context.log(f"{str(report).replace(REST, rest)}\n")
    return report
