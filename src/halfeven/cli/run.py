"""Open a run for a command: the data, the processes, the folder that holds a run, and the table of accuracies."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from halfeven.cli.lock import locked
from halfeven.cli.task import make_task
from halfeven.config import Experiment, as_dict
from halfeven.distributed import rank, smallest
from halfeven.errors import CheckpointError, ConfigError, StorageError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.files import remove, storing, write_atomically
from halfeven.options import Options, up_to_date
from halfeven.quantization.own_class import OwnClass, plain_values
from halfeven.tasks import Task
from halfeven.tasks.task import Metrics
from halfeven.training.accelerator import make_accelerator
from halfeven.training.progress import plain_console
from halfeven.training.sampling import seeded
from halfeven.training.state import STATE_FILE
from halfeven.zoo.checked_samples import SKIPPED, check_targets, checked, count_skipped
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.leakage import check_apart

RECORD = "experiment.json"
"""The resolved experiment, written beside the results: a folder that has it holds a run."""
FLOAT_FOLDER = "float"
"""Folder of the training of the float model, if there is one."""
BEST = "best.safetensors"
LAST = "last.safetensors"
PTQ_STATE = "ptq_state"
"""Folder of the layers and blocks that post-training quantization has reconstructed, until it has finished."""
SEARCH_STATE = "search_state"
"""Folder of the measurements of a search, until it has finished."""
SEARCH_FOUND = "search.json"
"""The result of a search, without its model."""
RESULTS = "results.json"
RESUMED_FROM = (
    STATE_FILE,
    BEST,
    f"{FLOAT_FOLDER}/{STATE_FILE}",
    f"{FLOAT_FOLDER}/{BEST}",
    PTQ_STATE,
    SEARCH_STATE,
    SEARCH_FOUND,
)
"""Files that a resumed run continues from; a new run in the same folder removes them first."""
SEEN_WITHIN_SECONDS = 30.0
"""Seconds in which a file of one machine appears on another that shares the disk; NFS remembers for a while that a file
is not there."""
MAY_CHANGE = (
    *(
        "device.kind",
        "device.threads",
        "export",
        "data.workers",
        "data.on_bad_sample",
        "data.root",
        "training.log_every",
        "training.save_every",
    ),
    *("ptq.memory", "ptq.cache_folder"),
)
"""Fields that may differ when a run is resumed: they do not change its result."""


@dataclass(frozen=True)
class RunContext:
    """The experiment, data, task, device and folder that all steps of a command share."""

    experiment: Experiment
    folder: Path
    accelerator: Accelerator
    console: Console
    datasets: Datasets
    task: Task

    def loader(self, items: Any, *, shared: bool = True, batch_size: int = 0) -> Any:
        """Return evaluation batches of a part of the data.

        Args:
            items: the part, such as `datasets.validation`.
            shared: give each process its own share of the items, rather than all.
            batch_size: samples of a batch; 0: as the experiment says.
        """
        data = self.experiment.data
        size = batch_size or data.evaluation_batch_size
        return evaluation_loader(items, size, data.workers, shared=shared, collate=self.task.collate)

    def accuracy(self, model: Callable[..., Any], device: torch.device | str | None = None) -> Metrics:
        """Return the task's metrics on the validation data, computed by all processes of the run together."""
        device = self.accelerator.device if device is None else device
        if isinstance(model, nn.Module):
            model.to(device)
        return evaluate(model, self.loader(self.datasets.validation), self.task, device=device)

    def selection_accuracy(self, model: Callable[..., Any]) -> Metrics:
        """Return the task's metrics on the samples that choose the best checkpoint, by all processes together."""
        if self.datasets.holdout is None:
            return self.accuracy(model)
        if isinstance(model, nn.Module):
            model.to(self.accelerator.device)
        # Samples that only come augmented are augmented alike each time, or chance would choose.
        with seeded(self.experiment.seed):
            loader = self.loader(self.datasets.holdout)
            return evaluate(model, loader, self.task, device=self.accelerator.device)

    @property
    def selection(self) -> str:
        """Return which samples choose the best checkpoint, for messages."""
        part = "validation samples themselves" if self.datasets.holdout is None else "held-out training samples"
        return f"{len(self.datasets.selection)} {part}"

    def selected_name(self, model: str) -> str:
        """Return the name, in logs, of a model's accuracy on the samples that choose the best checkpoint."""
        return model if self.datasets.holdout is None else f"{model}, holdout"

    def log(self, text: str) -> None:
        """Print a line, from the first process alone."""
        self.console.print(text, highlight=False, soft_wrap=True)


def open_run(experiment: Experiment, folder: Path) -> RunContext:
    """Join the processes and open the data.

    Raises:
        ConfigError: data, model and device do not go together.
    """
    accelerator = make_accelerator(experiment.device)
    console = plain_console(quiet=not accelerator.is_main_process)
    datasets = checked(load_datasets(experiment.data), experiment.data.on_bad_sample, folder)
    if mismatches := _mismatches(experiment, datasets):
        raise ConfigError(
            f"Model and data do not go together, so no loss can be computed: {'; '.join(mismatches)}. Set the options "
            "of `model` to match the data."
        )
    task = make_task(experiment, datasets)
    with seeded(experiment.seed):
        check_targets(datasets, task.wrong_target, one_size=type(task).collate is Task.collate)
    torch.manual_seed(experiment.seed)
    context = RunContext(experiment, folder, accelerator, console, datasets, task)
    if datasets.holdout is not None and datasets.train_as_evaluated is None:
        context.log(
            f"{experiment.data.function} gives no train_as_evaluated, so the held-out samples are read as those of "
            "training, with any augmentation, which is the same in each epoch."
        )
    return context


def _mismatches(experiment: Experiment, datasets: Datasets) -> list[str]:
    """List the options of the model that do not match the data; of a model of the user's own there are none."""
    options = experiment.model
    if options.source == "callable":
        return []
    example = datasets.example()
    found = []
    if options.num_classes != datasets.num_classes:
        found.append(f"model.num_classes={options.num_classes}, and the data has {datasets.num_classes}")
    if isinstance(example, dict) and options.source != "transformers":
        found.append(f'model.source="{options.source}" reads images, and the data gives texts')
    if isinstance(example, Tensor) and options.source == "transformers" and experiment.task.kind != "detection":
        found.append('model.source="transformers" reads texts, and the data gives images')
    if isinstance(example, Tensor) and options.in_chans != example.shape[1]:
        found.append(f"model.in_chans={options.in_chans}, and the images have {example.shape[1]}")
    return found


def default_folder(config: Path, work_dir: str) -> Path:
    """Return the work folder that the user named, or else the folder with the config's name."""
    return Path(work_dir or Path("work_dirs") / config.stem)


def holds_run(folder: Path) -> bool:
    """Return True for a folder with a run that can be resumed, or lost."""
    return (folder / RECORD).is_file() and any((folder / name).exists() for name in RESUMED_FROM)


def continues(context: RunContext, *, resume: bool, auto_resume: bool, overwrite: bool) -> bool:
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
    if smallest(found, device) == smallest(not found, device):
        raise _not_shared(context.folder)
    return resume or (auto_resume and found)


def _not_shared(folder: Path) -> ConfigError:
    return ConfigError(
        f"The processes of this run see different things in the work folder ({folder} in process {rank()}), so they "
        "could not go on from the same state. With several machines, --work-dir must name a folder on a disk that all "
        "of them share."
    )


def check_folder(context: RunContext, command: str, *, resume: bool, overwrite: bool) -> None:
    """Check that the work folder can be used, and write nothing.

    Args:
        context: the run.
        command: "train" or "ptq": a run is resumed by the command that started it.
        resume: continue the run in the folder.
        overwrite: start anew where the folder holds a run.

    Raises:
        ConfigError: there is nothing to resume, the options differ from the run's, a run would be lost, or calibration
            samples are validation samples too.
        CheckpointError: the record of the run's options is damaged.
    """
    check_apart(context.datasets)
    record = context.folder / RECORD
    recorded = record.is_file()
    held = holds_run(context.folder)
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
    if resume:
        _check_same_run(_read_record(record), _facts(context, command), context.folder)


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
                held.enter_context(locked(context.folder, context.log))
                _write_record(context, command, resume=resume)
            except StorageError as error:
                refusal = error
        # No process waits for the one that was refused.
        if smallest(0 if refusal else 1, context.accelerator.device) == 0:
            raise refusal or StorageError(f"The first process of this run cannot use {context.folder}; it says why.")
        _check_shared(context, command)
        yield
        if count := count_skipped(context.folder):
            context.log(f"Bad samples were replaced by the next good ones ({count}): see {context.folder / SKIPPED}.")


def _check_shared(context: RunContext, command: str) -> None:
    """Raise ConfigError where a process does not see what the first one has written: it works on another disk."""
    wanted = _as_plain(_facts(context, command))
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while not (seen := _sees(context.folder / RECORD, wanted)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if smallest(seen, context.accelerator.device) == 0:
        raise _not_shared(context.folder)


def _sees(path: Path, wanted: Any) -> bool:
    return path.is_file() and _as_plain(_read_record(path)) == wanted


def _write_record(context: RunContext, command: str, *, resume: bool) -> None:
    for name in (*RESUMED_FROM, LAST, SKIPPED) if not resume else ():
        remove(context.folder / name)
    text = json.dumps(_facts(context, command), indent=2) + "\n"
    write_atomically(context.folder / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def _facts(context: RunContext, command: str) -> dict[str, Any]:
    return {"command": command, **as_dict(context.experiment)}


def _read_record(path: Path) -> dict[str, Any]:
    """Return the options that a run was started with, from its file."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError(f"it holds a {type(recorded).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), so nothing says with which options the run was started, and it cannot be "
            "resumed. Put the file back from a copy, or give --overwrite to start anew."
        ) from error
    return recorded


def _check_same_run(recorded: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where a run is resumed with other options: its result would match neither run."""
    past = _as_plain({"command": "train", **_up_to_date_record(Experiment, recorded)})
    differing = [
        f"{name} was {json.dumps(was)} and is {json.dumps(now)}"
        for name, was, now in _differences("", past, _as_plain(present))
        if not name.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"The run in {folder} was started with other options: {'; '.join(differing)}. Resumed with these, "
            "the result would match neither run. Give the options it was started with, or --overwrite to start anew."
        )


def _up_to_date_record(kind: Any, recorded: Any) -> Any:
    """Return recorded options as this version spells them; `kind` is the type of the field that they were."""
    if isinstance(recorded, list | tuple):
        member = next(iter(get_args(kind)), None)
        return tuple(_up_to_date_record(member, item) for item in recorded)
    if not (isinstance(recorded, dict) and isinstance(kind, type) and issubclass(kind, Options)):
        return recorded
    hints = get_type_hints(kind)
    tupled = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    # The user has not written the record, so a warning would ask for a change that cannot be made.
    current = up_to_date(kind, tupled, warn=False)
    # A field that came with a later version than the run's has its default.
    for field in dataclasses.fields(cast(Any, kind)):
        if field.default is not dataclasses.MISSING:
            current.setdefault(field.name, field.default)
    return {name: _up_to_date_record(hints.get(name), _without_code(value)) for name, value in current.items()}


def _without_code(value: Any) -> Any:
    """Return what a record has of a user's class; any other value as it is."""
    return plain_values(value) if isinstance(value, OwnClass) else value


def _as_plain(values: Any) -> Any:
    """Return values as JSON gives them back."""
    return json.loads(json.dumps(values))


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _differences(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    elif was != now:
        yield name, was, now


def show(context: RunContext, rows: dict[str, Metrics], files: Mapping[str, object], caption: str = "") -> None:
    """Print the accuracies as one table.

    Args:
        context: the run.
        rows: metrics by the model's name.
        files: the file of a model, by the same name.
        caption: a line below the table.
    """
    title = f"{len(context.datasets.validation)} validation samples"
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    table.add_column("model")
    for metric in next(iter(rows.values())):
        table.add_column(f"{metric}, %", justify="right")
    table.add_column("file")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.values()), str(files.get(name, "")))
    context.console.print(table)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results for other programs, and print where."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"Wrote {path}.")
