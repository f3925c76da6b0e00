"""`halfeven export`: the deployable files of a checkpoint, verified."""

from dataclasses import dataclass
from pathlib import Path

from halfeven.checkpoint import read_facts
from halfeven.cli.arguments import CheckpointArguments
from halfeven.cli.deliver import check_replaceable, export_verified, target_of
from halfeven.cli.float_model import network_of
from halfeven.cli.results import write_json
from halfeven.cli.run import open_run
from halfeven.pipelines import load

VERIFICATION_FILE = "verification.json"
"""File of the whole reports."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments(CheckpointArguments):
    """Write the deployable files of a checkpoint, and verify their integers in the runtime."""

    work_dir: str = ""
    """Folder for the files; "" for the checkpoint's."""
    json: str = ""
    """File to write the content of verification.json to as well; "" for none."""


def run_export(arguments: ExportArguments) -> None:
    """Export the checkpoint, verify each file, and write the reports to verification.json."""
    checkpoint = arguments.checkpoint
    folder = Path(arguments.work_dir or checkpoint.parent)
    read_facts(checkpoint)  # a wrong path shows before the data is read
    context = open_run(arguments.experiment, folder)
    qmodel = load(checkpoint, network_of(arguments.experiment), context.datasets.example())
    target = target_of(context, qmodel)
    check_replaceable([folder / f"model{ending}" for ending in arguments.experiment.endings(target)], target)
    reports = export_verified(context, qmodel, folder, VERIFICATION_FILE)
    found = {path.name: report.to_dict() for path, report in reports.items()}
    for path in (folder / VERIFICATION_FILE, *([Path(arguments.json)] if arguments.json else [])):
        write_json(path, found)
