"""What the commands share: the data, the processes, the folder that holds a run, and the table of accuracies."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from halfeven.cli.task import make_task
from halfeven.config import Experiment, as_dict
from halfeven.errors import ConfigError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.files import write_atomically
from halfeven.tasks import Task
from halfeven.tasks.task import Metrics
from halfeven.training.accelerator import make_accelerator
from halfeven.training.state import STATE_FILE
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.leakage import check_apart

RECORD = "experiment.json"
"""The resolved experiment, written beside the results: a folder that holds it holds a run."""
FLOAT_FOLDER = "float"
"""Where the training of the float model, if there is one, keeps its files."""
BEST = "best.safetensors"
PTQ_STATE = "ptq_state"
"""Where post-training quantization keeps what it has reconstructed, until it is through."""
RESULTS = "results.json"


@dataclass(frozen=True)
class Work:
    """What all steps of a command share."""

    experiment: Experiment
    folder: Path
    accelerator: Accelerator
    console: Console
    datasets: Datasets
    task: Task

    def loader(self, items: Any, *, shared: bool = True, batch_size: int = 0) -> Any:
        """Evaluation batches of some of the data."""
        data = self.experiment.data
        size = batch_size or data.evaluation_batch_size
        return evaluation_loader(items, size, data.workers, shared=shared, collate=self.task.collate)

    def accuracy(self, model: Callable[..., Any], device: torch.device | str | None = None) -> Metrics:
        """The task's figures on the validation data, taken by all processes of the run together."""
        device = self.accelerator.device if device is None else device
        if isinstance(model, nn.Module):
            model.to(device)
        return evaluate(model, self.loader(self.datasets.validation), self.task, device=device)

    def say(self, text: str) -> None:
        """Print a line, from the first process alone."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def open_work(experiment: Experiment, folder: Path) -> Work:
    """Join the processes and open the data.

    Raises:
        ConfigError: data, model and device that do not go together.
    """
    accelerator = make_accelerator(experiment.device)
    console = Console(quiet=not accelerator.is_main_process)
    datasets = load_datasets(experiment.data)
    example, options = datasets.example(), experiment.model
    wrong = []
    if options.source != "callable" and options.num_classes != datasets.num_classes:
        wrong.append(f"model.num_classes={options.num_classes}, and the data has {datasets.num_classes}")
    if isinstance(example, dict) and options.source not in ("transformers", "callable"):
        wrong.append(f'model.source="{options.source}" reads images, and the data gives texts')
    if isinstance(example, Tensor) and options.source == "transformers":
        wrong.append('model.source="transformers" reads texts here, and the data gives images')
    if isinstance(example, Tensor) and options.source != "callable" and options.in_chans != example.shape[1]:
        wrong.append(f"model.in_chans={options.in_chans}, and the images have {example.shape[1]}")
    if wrong:
        raise ConfigError(
            f"Model and data do not go together: {'; '.join(wrong)}. The loss could not be computed. Set the model's "
            "to the data's."
        )
    torch.manual_seed(experiment.seed)
    return Work(experiment, folder, accelerator, console, datasets, make_task(experiment, datasets))


def default_folder(config: Path, work_dir: str) -> Path:
    """The work folder that was asked for, or the one of the config's name."""
    return Path(work_dir or Path("work_dirs") / config.stem)


def open_folder(work: Work, command: str, *, resume: bool, overwrite: bool) -> None:
    """Make the work folder and write down the experiment, or check that there is a run to resume.

    Args:
        command: "train" or "ptq": a run is resumed by the command that started it.

    Raises:
        ConfigError: nothing to resume, other options than the run's, a run that would be lost, or calibration images
            that are validation images.
    """
    check_apart(work.datasets)
    record = work.folder / RECORD
    held = record.is_file()
    work.accelerator.wait_for_everyone()  # all processes look before the first one writes
    if resume and not held:
        raise ConfigError(
            f"There is no run in {work.folder}, so nothing can be resumed. Leave --resume out, or give the --work-dir "
            "of the run."
        )
    if held and not resume and not overwrite:
        raise ConfigError(
            f"{work.folder} holds a run already, whose checkpoints would be lost. Give --resume to go on with it, "
            "another --work-dir to keep it, or --overwrite to start anew."
        )
    facts = {"command": command, **as_dict(work.experiment)}
    if resume:
        _check_same_run(json.loads(record.read_text(encoding="utf-8")), facts, work.folder)
    if work.accelerator.is_main_process:
        for name in RESUMED_FROM if not resume else ():
            _remove(work.folder / name)
        text = json.dumps(facts, indent=2) + "\n"
        write_atomically(record, lambda path: path.write_text(text, encoding="utf-8"))
    work.accelerator.wait_for_everyone()


RESUMED_FROM = (STATE_FILE, BEST, f"{FLOAT_FOLDER}/{STATE_FILE}", f"{FLOAT_FOLDER}/{BEST}", PTQ_STATE)
"""What a run goes on from, and what a new one in the same folder must not find."""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


MAY_CHANGE = (
    *("device", "export", "data.workers", "data.root", "training.log_every", "training.save_every"),
    *("ptq.memory", "ptq.cache_folder"),
)
"""Fields that a resumed run may have otherwise: they do not change what it ends with."""


def _check_same_run(recorded: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where a run shall be resumed with other options: its result would be that of neither."""
    differing = [
        f"{name} was {json.dumps(was)} and is {json.dumps(now)}"
        for name, was, now in _differences("", {"command": "train"} | recorded, json.loads(json.dumps(present)))
        if not name.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"The run in {folder} was started with other options: {'; '.join(differing)}. Resumed with these, it "
            "would end as neither of the two runs would. Give the options it was started with, or --overwrite to start "
            "anew."
        )


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _differences(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    elif was != now:
        yield name, was, now


def show(work: Work, rows: dict[str, Metrics], files: Mapping[str, object]) -> None:
    """Print the accuracies as one table."""
    kind = "images" if isinstance(work.datasets.example(), Tensor) else "texts"
    table = Table(title=f"{len(work.datasets.validation)} validation {kind}", title_justify="left")
    table.add_column("model")
    for metric in next(iter(rows.values())):
        table.add_column(f"{metric}, %", justify="right")
    table.add_column("file")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.values()), str(files.get(name, "")))
    work.console.print(table)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results for other programs."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"Wrote {path}.")
