"""What the commands do: train, test and export, each as its steps in order."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from halfeven.config import Experiment, as_dict
from halfeven.distributed import world_size
from halfeven.errors import ConfigError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.export import export, load_deployed, verify
from halfeven.pipelines import load, prepare, rebuild
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan
from halfeven.ptq.calibration import calibrate
from halfeven.qat.batchnorm import needs_re_estimation, re_estimate, schedule
from halfeven.training.accelerator import make_accelerator, mixed_precision
from halfeven.training.checkpoint import read_facts, save, save_weights
from halfeven.training.options import TrainingOptions
from halfeven.training.state import STATE_FILE, load_state, write_atomically
from halfeven.training.trainer import Callbacks, Metrics, Run, Trainer
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.models import PRETRAINED, create_model
from halfeven.zoo.weights import load_weights

RECORD = "experiment.json"
"""The resolved experiment, written beside the results: a folder that holds it holds a run."""
FLOAT_FOLDER = "float"
"""Where the training of the float model, if there is one, keeps its files."""
BEST = "best.safetensors"


@dataclass(frozen=True)
class Work:
    """What all steps of a command share."""

    experiment: Experiment
    folder: Path
    accelerator: Accelerator
    console: Console
    datasets: Datasets

    def loader(self, images: Any, *, shared: bool = True) -> Any:
        """Evaluation batches of some images."""
        data = self.experiment.data
        return evaluation_loader(images, data.evaluation_batch_size, data.workers, shared=shared)

    def accuracy(self, model: Callable[[Tensor], Any], device: torch.device | str | None = None) -> Metrics:
        """Accuracy on the validation images, taken by all processes of the run together."""
        device = self.accelerator.device if device is None else device
        if isinstance(model, nn.Module):
            model.to(device)
        return evaluate(model, self.loader(self.datasets.validation), self.datasets.num_classes, device=device)

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
    channels, options = datasets.example().shape[1], experiment.model
    wrong = []
    if options.source != "callable" and options.num_classes != datasets.num_classes:
        wrong.append(f"model.num_classes={options.num_classes}, and the data has {datasets.num_classes}")
    if options.source != "callable" and options.in_chans != channels:
        wrong.append(f"model.in_chans={options.in_chans}, and the images have {channels}")
    if wrong:
        raise ConfigError(
            f"Model and data do not go together: {'; '.join(wrong)}. The loss could not be computed. Set the model's "
            "to the data's."
        )
    torch.manual_seed(experiment.seed)
    return Work(experiment, folder, accelerator, console, datasets)


def run_training(
    experiment: Experiment,
    *,
    config: Path,
    work_dir: str = "",
    resume: bool = False,
    overwrite: bool = False,
    amp: bool = False,
    auto_scale_lr: bool = False,
) -> None:
    """Float model, plan, calibration, training, export, verification; then one table."""
    folder = Path(work_dir or Path("work_dirs") / config.stem)
    if not (experiment.model.weights or experiment.pretraining.epochs or experiment.model.source == "callable"):
        raise ConfigError(
            f'The float model {experiment.model.name} has no weights (model.weights="") and is not trained first '
            "(pretraining.epochs=0), so random numbers would be quantized. Give model.weights a file or "
            '"pretrained", or pretraining.epochs at least 1.'
        )
    if amp:
        device = dataclasses.replace(experiment.device, precision=mixed_precision())
        experiment = dataclasses.replace(experiment, device=device)
    work = open_work(experiment, folder)
    if auto_scale_lr:
        work = _with_scaled_rates(work)
    _open_folder(work, resume=resume, overwrite=overwrite)
    model = create_model(experiment.model)
    resume_training = resume and (folder / STATE_FILE).is_file()
    if resume_training:
        qmodel, header = _continue(work, model)
    else:
        qmodel, header = _start(work, model, resume=resume)
    _train_quantized(work, qmodel, header, resume=resume_training)
    main = work.accelerator.is_main_process
    work.accelerator.end_training()  # what follows is the first process's alone
    if main:
        _deliver(work, model, header["float"])


def _with_scaled_rates(work: Work) -> Work:
    """Learning rates meant for `base_batch_size` images, for the batch over all processes."""

    def scaled(options: TrainingOptions) -> TrainingOptions:
        batch = options.batch_size * options.accumulation * world_size()
        return dataclasses.replace(options, learning_rate=options.learning_rate * batch / options.base_batch_size)

    names = ("training", "pretraining")
    experiment = work.experiment
    for name in names:
        before: TrainingOptions = getattr(experiment, name)
        changes: dict[str, Any] = {name: scaled(before)}
        experiment = dataclasses.replace(experiment, **changes)
        if before.epochs:
            rate = changes[name].learning_rate
            work.say(f"{name}.learning_rate: {before.learning_rate:g} scaled to {rate:g}.")
    return dataclasses.replace(work, experiment=experiment)


def _open_folder(work: Work, *, resume: bool, overwrite: bool) -> None:
    """Make the work folder and write down the experiment, or check that there is a run to resume."""
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
            "another "
            "--work-dir to keep it, or --overwrite to start anew."
        )
    if resume:
        _check_same_experiment(json.loads(record.read_text(encoding="utf-8")), work)
    if work.accelerator.is_main_process:
        for name in (STATE_FILE, BEST, f"{FLOAT_FOLDER}/{STATE_FILE}", f"{FLOAT_FOLDER}/{BEST}") if not resume else ():
            (work.folder / name).unlink(missing_ok=True)
        text = json.dumps(as_dict(work.experiment), indent=2) + "\n"
        write_atomically(record, lambda path: path.write_text(text, encoding="utf-8"))
    work.accelerator.wait_for_everyone()


MAY_CHANGE = ("device", "export", "data.workers", "data.root", "training.log_every", "training.save_every")
"""Fields that a resumed run may have otherwise: they do not change what it ends with."""


def _check_same_experiment(recorded: dict[str, Any], work: Work) -> None:
    """Raise ConfigError where a run shall be resumed with other options: its result would be that of neither."""
    present = json.loads(json.dumps(as_dict(work.experiment)))
    differing = [
        f"{name} was {json.dumps(was)} and is {json.dumps(now)}"
        for name, was, now in _differences("", recorded, present)
        if not name.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"The run in {work.folder} was started with other options: {'; '.join(differing)}. Resumed with these, it "
            "would end as neither of the two runs would. Give the options it was started with, or --overwrite to start "
            "anew."
        )


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _differences(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    elif was != now:
        yield name, was, now


def _continue(work: Work, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The quantized model as it was when the training was interrupted, but for its weights, which the trainer loads."""
    header: dict[str, Any] = json.loads(load_state(work.folder / STATE_FILE).header)
    trained = work.folder / FLOAT_FOLDER / BEST
    if work.experiment.pretraining.epochs:
        load_weights(model, trained)
    return rebuild(model, work.datasets.example(), Plan.from_dict(header["plan"])), header


def _start(work: Work, model: nn.Module, *, resume: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The quantized model, calibrated, and what is known of it. Its plan is shown before any long work."""
    example, options = work.datasets.example(), work.experiment.quantization
    qmodel = prepare(model, example, options)
    work.say(f"{plan_of(qmodel)}\n")
    if work.experiment.pretraining.epochs:
        _train_float(work, model, resume=resume and (work.folder / FLOAT_FOLDER / STATE_FILE).is_file())
        qmodel = prepare(model, example, options)
    float_metrics = work.accuracy(model)
    calibrate(qmodel.to(work.accelerator.device), work.loader(work.datasets.calibration, shared=False))
    calibrated = work.accuracy(qmodel)
    return qmodel, {"plan": plan_of(qmodel).to_dict(), "float": float_metrics, "calibrated": calibrated}


def _train_float(work: Work, model: nn.Module, *, resume: bool) -> None:
    """Train the float model and leave it with its best weights."""
    folder = work.folder / FLOAT_FOLDER
    run = Run(
        folder=folder,
        accelerator=work.accelerator,
        console=work.console,
        seed=work.experiment.seed,
        workers=work.experiment.data.workers,
        name="float",
    )
    callbacks = Callbacks(validate=work.accuracy, save=save_weights)
    Trainer(model, work.datasets.train, work.experiment.pretraining, callbacks, run).run(resume=resume)
    work.accelerator.free_memory()
    load_weights(model, folder / BEST)


def _train_quantized(work: Work, qmodel: nn.Module, header: dict[str, Any], *, resume: bool) -> None:
    experiment = work.experiment
    hooks: list[Callable[[nn.Module], None]] = []
    if needs_re_estimation(qmodel, experiment.schedule):
        batches = experiment.schedule.re_estimate_batches
        hooks.append(lambda model: re_estimate(model, work.loader(work.datasets.calibration, shared=False), batches))
    callbacks = Callbacks(
        validate=work.accuracy,
        save=lambda model, path, facts: save(model, path, facts | {"float": header["float"]}),
        before_step=(schedule(experiment.schedule),),
        before_validation=hooks,
        known={"float": header["float"], "int8, calibrated": header["calibrated"]},
    )
    run = Run(
        folder=work.folder,
        accelerator=work.accelerator,
        console=work.console,
        seed=experiment.seed,
        workers=experiment.data.workers,
    )
    Trainer(qmodel, work.datasets.train, experiment.training, callbacks, run, header).run(resume=resume)


def _deliver(work: Work, model: nn.Module, float_metrics: Metrics) -> None:
    """Export the best checkpoint, verify the files, and show the accuracy of all three models."""
    best = work.folder / BEST
    qmodel = load(best, model.cpu(), work.datasets.example())
    reports = _export_verified(work, qmodel, work.folder, model)
    rows = {"float": float_metrics, "simulated": work.accuracy(qmodel)}
    files = {"simulated": best}
    for path in reports:
        name = "deployed" if len(reports) == 1 else f"deployed {path.suffix}"
        rows[name], files[name] = work.accuracy(load_deployed(path), "cpu"), path
    show(work, rows, files)
    results = {**rows, "verification": {path.name: report.to_dict() for path, report in reports.items()}}
    _write_json(work.folder / "results.json", results)


def _export_verified(work: Work, qmodel: nn.Module, folder: Path, float_model: nn.Module | None) -> dict[Path, Any]:
    """Write the files that the experiment names, and print what the runtime says of each."""
    options, images = work.experiment.export, work.datasets.validation
    qmodel = qmodel.cpu().eval()
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for suffix in options.formats:
        path = folder / f"model.{suffix}"
        work.say(f"Exporting {path}, verifying it on {min(options.verify_images, len(images))} images ...")
        export(qmodel, path)
        loader = evaluation_loader(images, options.verify_batch_size, work.experiment.data.workers)
        batches = [batch[0] for batch in islice(loader, -(-options.verify_images // options.verify_batch_size))]
        reports[path] = verify(qmodel, path, batches, float_model=float_model)
        work.say(f"{reports[path]}\n")
    return reports


def run_export(experiment: Experiment, *, config: Path, checkpoint: Path, work_dir: str = "") -> None:
    """Write the deployable files of a checkpoint, and verify them."""
    folder = Path(work_dir or checkpoint.parent)
    read_facts(checkpoint)  # a wrong path shows before the data is read
    work = open_work(experiment, folder)
    model, has_weights = _float_model(experiment, checkpoint)
    qmodel = load(checkpoint, model, work.datasets.example())
    reports = _export_verified(work, qmodel, folder, model if has_weights else None)
    _write_json(folder / "verification.json", {path.name: report.to_dict() for path, report in reports.items()})


def run_test(
    experiment: Experiment, *, config: Path, checkpoint: Path, json_file: str = "", deployed: str = ""
) -> None:
    """Accuracy of the float, the simulated and the deployed model in one table."""
    facts = read_facts(checkpoint)
    if deployed and not Path(deployed).is_file():
        raise ConfigError(
            f"There is no deployed file {deployed} to test. Give the .xml or .onnx that `halfeven export` wrote, or "
            "leave "
            "--deployed out: the checkpoint is then exported for the test."
        )
    work = open_work(experiment, checkpoint.parent)
    model, has_weights = _float_model(experiment, checkpoint)
    qmodel = load(checkpoint, model, work.datasets.example())
    rows: dict[str, Metrics] = {}
    if has_weights:
        rows["float"] = work.accuracy(model)
    elif recorded := facts.get("extra", {}).get("float"):
        rows["float"] = recorded
        work.say("The float weights are not at hand; their accuracy is the one recorded in the checkpoint.")
    rows["simulated"] = work.accuracy(qmodel)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(deployed or Path(temporary) / f"model.{experiment.export.formats[0]}")
        if not deployed:
            export(qmodel.cpu().eval(), path)
        rows["deployed"] = work.accuracy(load_deployed(path), "cpu")
        if work.accelerator.is_main_process:
            show(work, rows, {"simulated": checkpoint, "deployed": deployed or "exported for this test"})
    if json_file and work.accelerator.is_main_process:
        _write_json(Path(json_file), rows)


def _float_model(experiment: Experiment, checkpoint: Path) -> tuple[nn.Module, bool]:
    """The float model of a checkpoint, and whether it has its weights: a quantized model can be tested without them."""
    trained, options = checkpoint.parent / FLOAT_FOLDER / BEST, experiment.model
    if experiment.pretraining.epochs:
        options = dataclasses.replace(options, weights=str(trained) if trained.is_file() else "")
    elif options.weights != PRETRAINED and not Path(options.weights).is_file():
        options = dataclasses.replace(options, weights="")
    return create_model(options), bool(options.weights)


def show(work: Work, rows: dict[str, Metrics], files: Mapping[str, object]) -> None:
    """Print the accuracies as one table."""
    table = Table(title=f"{len(work.datasets.validation)} validation images", title_justify="left")
    table.add_column("model")
    for metric in next(iter(rows.values())):
        table.add_column(f"{metric}, %", justify="right")
    table.add_column("file")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.values()), str(files.get(name, "")))
    work.console.print(table)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"Wrote {path}.")
