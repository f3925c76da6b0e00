"""The work folder of a run: which files it holds, whether a run in it is continued, and the lock on it."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfeven.cli.lock import locked
from halfeven.cli.run import RunContext
from halfeven.cli.run_record import as_json, check_same_run, read_record, recorded_facts, write_record
from halfeven.distributed import rank, smallest
from halfeven.errors import ConfigError, StorageError, named
from halfeven.files import remove_file, storing
from halfeven.training.state import STATE_FILE
from halfeven.zoo.checked_samples import SKIPPED_FILE, count_skipped
from halfeven.zoo.leakage import check_apart

RECORD_FILE = "experiment.json"
"""The resolved experiment, written beside the results: a folder that has it holds a run."""
FLOAT_FOLDER = "float"
"""Folder of the training of the float model, if there is one."""
BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
PTQ_STATE = "ptq_state"
"""Folder of the layers and blocks that post-training quantization has reconstructed, until it has finished."""
SEARCH_STATE = "search_state"
"""Folder of the measurements of a search, until it has finished."""
SEARCH_RESULT_FILE = "search.json"
"""The result of a search, without its model."""
RESULTS_FILE = "results.json"
RESUMED_FROM = (
    STATE_FILE,
    BEST_FILE,
    f"{FLOAT_FOLDER}/{STATE_FILE}",
    f"{FLOAT_FOLDER}/{BEST_FILE}",
    PTQ_STATE,
    SEARCH_STATE,
    SEARCH_RESULT_FILE,
)
"""Files that a resumed run continues from; a new run in the same folder removes them first."""
CHECKPOINTS = (*RESUMED_FROM, LAST_FILE)
DELIVERED = (
    *("model.xml", "model.bin", "model.onnx", "model.onnx.data", "verification.json", RESULTS_FILE),
    *("report.html", "report.xml.html", "report.onnx.html"),
)
"""Files that a run ends with. A new run in the folder of an old one removes them first: beside its checkpoint they
would pass for its own."""
SEEN_WITHIN_SECONDS = 30.0
"""Seconds in which a file of one machine appears on another that shares the disk; NFS remembers for a while that a file
is not there."""


def default_folder(config: Path, work_dir: str) -> Path:
    """Return the work folder that the user named, or else the folder with the config's name."""
    return Path(work_dir or Path("work_dirs") / config.stem)


def holds_run(folder: Path) -> bool:
    """Return True for a folder with a run that can be resumed, or lost."""
    return (folder / RECORD_FILE).is_file() and any((folder / name).exists() for name in RESUMED_FROM)


def is_continued(context: RunContext, *, resume: bool, auto_resume: bool, overwrite: bool) -> bool:
    """Return True where the run in the work folder is to be continued. The arguments are the command line's.

    Raises:
        ConfigError: the arguments contradict each other, or the processes see different folders.
    """
    if resume + auto_resume + overwrite > 1:
        given = {"--resume": resume, "--auto-resume": auto_resume, "--overwrite": overwrite}
        raise ConfigError(
            f"{' and '.join(name for name, on in given.items() if on)} were given, and only one of them can decide "
            "what becomes of a run in the work folder. Give one: --auto-resume continues a run, and starts where there "
            "is none."
        )
    found = holds_run(context.folder)
    device = context.accelerator.device
    # Both are 0 only if a process has found a run where another has not.
    if smallest(found, device) == smallest(not found, device):
        raise _not_shared_error(context.folder)
    return resume or (auto_resume and found)


def _not_shared_error(folder: Path) -> ConfigError:
    return ConfigError(
        f"The processes of this run see different things in the work folder ({folder} in process {rank()}), so they "
        "could not go on from the same state. With several machines, --work-dir must name a folder on a disk that all "
        "of them share."
    )


def remove_state(folder: Path, name: str) -> None:
    """Remove the state of a step that has finished. A run killed meanwhile removes the rest when it is resumed."""
    shutil.rmtree(folder / name, ignore_errors=True)


def check_folder(context: RunContext, command: str, *, resume: bool, overwrite: bool) -> None:
    """Check that the work folder can be used, and write nothing.

    Args:
        context: the run.
        command: "train" or "ptq": a run is resumed by the command that started it.
        resume: continue the run in the folder.
        overwrite: start anew where the folder holds a run.

    Raises:
        ConfigError: there is nothing to resume, the options differ from the run's, a run or checkpoints would be lost,
            or calibration samples are validation samples too.
        CheckpointError: the record of the run's options is damaged.
    """
    # Ranges fitted to validation samples would flatter every accuracy of the run.
    check_apart(context.datasets)
    record = context.folder / RECORD_FILE
    recorded = record.is_file()
    held = holds_run(context.folder)
    lost = [path for name in CHECKPOINTS if (path := context.folder / name).exists() and not resume]
    context.accelerator.wait_for_everyone()  # all processes look before the first one writes
    if resume and not recorded:
        raise ConfigError(
            f"There is no run in {context.folder}, so nothing can be resumed. Leave --resume out, or give the "
            "--work-dir of the run."
        )
    if held and not resume and not overwrite:
        raise ConfigError(
            f"{context.folder} holds a run already, whose checkpoints would be lost. Give --resume to continue it, "
            "another --work-dir to keep it, or --overwrite to start anew."
        )
    if lost and not recorded and not overwrite:
        raise ConfigError(
            f"{context.folder} holds {named(lost)}, and no run that they belong to: a run there would delete them. "
            "Give another --work-dir, or --overwrite to delete them."
        )
    weights = Path(context.experiment.model.weights)
    if weights.is_file() and any(weights.samefile(path) for path in lost):
        raise ConfigError(
            f'The run in {context.folder} would delete the float weights that it starts from (model.weights="{weights}"'
            "). Give another --work-dir, or copy the weights elsewhere."
        )
    if resume:
        check_same_run(read_record(record), recorded_facts(context, command), context.folder)


@contextmanager
def claimed_folder(context: RunContext, command: str, *, resume: bool) -> Iterator[None]:
    """Make the work folder, lock it within the context, and write down the experiment.

    Call this when all that can be checked beforehand was right.

    Args:
        context: the run.
        command: "train" or "ptq".
        resume: keep the files that a run is resumed from.

    Raises:
        StorageError: the folder cannot be written, or another process works in it.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        if context.accelerator.is_main_process:
            try:
                with storing(context.folder):
                    context.folder.mkdir(parents=True, exist_ok=True)
                # The lock comes before the record: the files of a run that is still going on must not be removed.
                held.enter_context(locked(context.folder, context.log))
                _begin_record(context, command, resume=resume)
            except StorageError as error:
                refusal = error
        # No process waits for the one that was refused.
        if smallest(0 if refusal else 1, context.accelerator.device) == 0:
            raise refusal or StorageError(f"The first process of this run cannot use {context.folder}; it says why.")
        _check_folder_is_shared(context, command)
        yield
        if count := count_skipped(context.folder):
            context.log(
                f"Bad samples were replaced by the next good ones ({count}): see {context.folder / SKIPPED_FILE}."
            )


def _check_folder_is_shared(context: RunContext, command: str) -> None:
    """Raise ConfigError where a process does not see the record that the first one wrote: it works on another disk."""
    wanted = as_json(recorded_facts(context, command))
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while not (seen := _holds_record(context.folder / RECORD_FILE, wanted)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if smallest(seen, context.accelerator.device) == 0:
        raise _not_shared_error(context.folder)


def _holds_record(path: Path, wanted: Any) -> bool:
    return path.is_file() and as_json(read_record(path)) == wanted


def _begin_record(context: RunContext, command: str, *, resume: bool) -> None:
    """Write the record of a run, and remove the files of an earlier run that is not continued."""
    # Without a record the folder is none of ours, and a model.onnx in it is the user's.
    delivered = DELIVERED if (context.folder / RECORD_FILE).is_file() else ()
    for name in (*CHECKPOINTS, SKIPPED_FILE, *delivered) if not resume else ():
        remove_file(context.folder / name)
    # The record comes last: where the run is killed before, no new record stands beside the files of an old run.
    write_record(context.folder / RECORD_FILE, recorded_facts(context, command))
