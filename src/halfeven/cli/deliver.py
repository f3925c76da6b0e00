"""From a checkpoint to verified files: the end that training and post-training quantization share."""

from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.cli.run import BEST, RESULTS, Work, show, write_json
from halfeven.pipelines import load
from halfeven.placement.insertion import plan_of
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import load_deployed
from halfeven.tasks.task import Metrics
from halfeven.verification.verify import verify


def deliver(work: Work, model: nn.Module, float_metrics: Metrics, facts: dict[str, Any] | None = None) -> None:
    """Export the best checkpoint, verify the files, and show the accuracy of all three models.

    Args:
        model: the float model.
        float_metrics: its accuracy.
        facts: what else `results.json` shall hold.
    """
    best = work.folder / BEST
    qmodel = load(best, model.cpu(), work.datasets.example())
    reports = export_verified(work, qmodel, work.folder, model)
    rows = {"float": float_metrics, "simulated": work.accuracy(qmodel)}
    files = {"simulated": best}
    for path in reports:
        name = "deployed" if len(reports) == 1 else f"deployed {path.suffix}"
        rows[name], files[name] = work.accuracy(load_deployed(path, target_of(work, qmodel), qmodel), "cpu"), path
    show(work, rows, files)
    verification = {path.name: report.to_dict() for path, report in reports.items()}
    write_json(work.folder / RESULTS, {**rows, **(facts or {}), "verification": verification})


def target_of(work: Work, qmodel: nn.Module) -> str:
    """The runtime that files are for: the one asked for, else the one that the model was quantized for."""
    return work.experiment.export.target or plan_of(qmodel).options.target


def export_verified(work: Work, qmodel: nn.Module, folder: Path, float_model: nn.Module | None) -> dict[Path, Any]:
    """Write the files that the experiment names, and print what the runtime says of each."""
    options, images = work.experiment.export, work.datasets.validation
    target = target_of(work, qmodel)
    qmodel = qmodel.cpu().eval()
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for ending in work.experiment.endings(target):
        path = folder / f"model{ending}"
        work.say(f"Exporting {path}, verifying it on {min(options.verify_images, len(images))} images ...")
        export(qmodel, path, target)
        loader = work.loader(images, shared=False, batch_size=options.verify_batch_size)
        batches = [batch[0] for batch in islice(loader, -(-options.verify_images // options.verify_batch_size))]
        reports[path] = verify(
            qmodel, path, batches, float_model=float_model, target=target, class_axis=work.task.class_axis,
            timed=options.timed,
        )  # fmt: skip
        work.say(f"{reports[path]}\n")
    return reports
