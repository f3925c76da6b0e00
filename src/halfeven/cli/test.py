"""What is done with a checkpoint: its accuracy, and its deployable files."""

import tempfile
from pathlib import Path

from halfeven.checkpoint import read_facts
from halfeven.cli.deliver import export_verified, target_of
from halfeven.cli.float_model import float_model_of
from halfeven.cli.run import open_work, show, write_json
from halfeven.config import Experiment
from halfeven.errors import ConfigError
from halfeven.pipelines import load
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import load_deployed
from halfeven.tasks.task import Metrics


def run_export(experiment: Experiment, *, config: Path, checkpoint: Path, work_dir: str = "") -> None:
    """Write the deployable files of a checkpoint, and verify them."""
    folder = Path(work_dir or checkpoint.parent)
    read_facts(checkpoint)  # a wrong path shows before the data is read
    work = open_work(experiment, folder)
    model, has_weights = float_model_of(experiment, checkpoint)
    qmodel = load(checkpoint, model, work.datasets.example())
    reports = export_verified(work, qmodel, folder, model if has_weights else None)
    write_json(folder / "verification.json", {path.name: report.to_dict() for path, report in reports.items()})


def run_test(
    experiment: Experiment, *, config: Path, checkpoint: Path, json_file: str = "", deployed: str = ""
) -> None:
    """Accuracy of the float, the simulated and the deployed model in one table."""
    facts = read_facts(checkpoint)
    if deployed and not Path(deployed).is_file():
        raise ConfigError(
            f"There is no deployed file {deployed} to test. Give the .xml or .onnx that `halfeven export` wrote, or "
            "leave --deployed out: the checkpoint is then exported for the test."
        )
    work = open_work(experiment, checkpoint.parent)
    model, has_weights = float_model_of(experiment, checkpoint)
    qmodel = load(checkpoint, model, work.datasets.example())
    rows: dict[str, Metrics] = {}
    if has_weights:
        rows["float"] = work.accuracy(model)
    elif recorded := facts.get("extra", {}).get("float"):
        rows["float"] = recorded
        work.say("The float weights are not at hand; their accuracy is the one recorded in the checkpoint.")
    rows["simulated"] = work.accuracy(qmodel)
    target = target_of(work, qmodel)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(deployed or Path(temporary) / f"model{experiment.endings(target)[0]}")
        if not deployed:
            export(qmodel.cpu().eval(), path, target)
        rows["deployed"] = work.accuracy(load_deployed(path, target, qmodel.cpu().eval()), "cpu")
        if work.accelerator.is_main_process:
            show(work, rows, {"simulated": checkpoint, "deployed": deployed or "exported for this test"})
    if json_file and work.accelerator.is_main_process:
        write_json(Path(json_file), rows)
