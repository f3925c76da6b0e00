"""Quantization-aware training: float model, plan, calibration, training, and the verified files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checkpoint import save
from halfeven.cli.deliver import deliver
from halfeven.cli.float_model import check_has_weights, train_float
from halfeven.cli.run import BEST, FLOAT_FOLDER, PTQ_STATE, Work, default_folder, open_folder, open_work
from halfeven.config import Experiment
from halfeven.distributed import world_size
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import prepare, rebuild, resume_qat, setup_qat
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan
from halfeven.qat.recipe import decide
from halfeven.qat.session import QATSession
from halfeven.training.accelerator import mixed_precision
from halfeven.training.options import TrainingOptions
from halfeven.training.state import STATE_FILE, load_state
from halfeven.training.trainer import Run, Trainer
from halfeven.zoo.models import create_model
from halfeven.zoo.weights import load_weights


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
    folder = default_folder(config, work_dir)
    check_has_weights(experiment)
    if amp:
        device = dataclasses.replace(experiment.device, precision=mixed_precision())
        experiment = dataclasses.replace(experiment, device=device)
    work = open_work(experiment, folder)
    if auto_scale_lr:
        work = _with_scaled_rates(work)
    open_folder(work, "train", resume=resume, overwrite=overwrite)
    model = create_model(experiment.model)
    resume_training = resume and (folder / STATE_FILE).is_file()
    if resume_training:
        qmodel, session, header = _continue(work, model)
    else:
        qmodel, session, header = _start(work, model, resume=resume)
    _train_quantized(work, qmodel, session, header, resume=resume_training)
    main = work.accelerator.is_main_process
    work.accelerator.end_training()  # what follows is the first process's alone
    if main:
        deliver(work, model, header["float"])


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


def _continue(work: Work, model: nn.Module) -> tuple[nn.Module, QATSession, dict[str, Any]]:
    """The quantized model as it was when the training was interrupted, but for its state, which the trainer loads."""
    header: dict[str, Any] = json.loads(load_state(work.folder / STATE_FILE).header)
    trained = work.folder / FLOAT_FOLDER / BEST
    if work.experiment.pretraining.epochs:
        load_weights(model, trained)
    qmodel = rebuild(model, work.datasets.example(), Plan.from_dict(header["plan"])).to(work.accelerator.device)
    experiment, (loader, inputs) = work.experiment, _loaders(work)
    recipe = decide(qmodel, experiment.qat, experiment.schedule)
    teacher, qat, schedule = model.to(work.accelerator.device), experiment.qat, experiment.schedule
    session = resume_qat(qmodel, teacher, recipe, loader, qat, schedule, inputs, work.task.logits)
    return qmodel, session, header


def _loaders(work: Work) -> tuple[Any, Callable[[], Any]]:
    """The calibration batches, and what gives batches for BatchNorm's statistics."""
    loader = work.loader(work.datasets.calibration, shared=False)
    return loader, lambda: loader


def _start(work: Work, model: nn.Module, *, resume: bool) -> tuple[nn.Module, QATSession, dict[str, Any]]:
    """The quantized model as its training starts, and what is known of it. Its plan is shown before any long work."""
    experiment = work.experiment
    example, options = work.datasets.example(), experiment.quantization
    qmodel = prepare(model, example, options)
    work.say(f"{plan_of(qmodel)}\n")
    if work.experiment.pretraining.epochs:
        train_float(work, model, resume=resume)
        qmodel = prepare(model, example, options)
    float_metrics = work.accuracy(model)
    loader, inputs = _loaders(work)
    scheme = experiment.quantization.scheme
    start = work.accuracy(calibrate(qmodel.to(work.accelerator.device), loader))
    known = {"float": float_metrics, f"{scheme}, calibrated": start}
    session = setup_qat(
        qmodel,
        model,
        loader,
        experiment.qat,
        experiment.schedule,
        ptq=experiment.ptq,
        inputs=inputs,
        log=work.say,
        resume_dir=work.folder / PTQ_STATE,
        logits=work.task.logits,
    )
    if session.recipe.equalize.enabled and not session.recipe.reconstruct.enabled:
        start = known[f"{scheme}, equalized"] = work.accuracy(qmodel)
    if session.recipe.reconstruct.enabled:
        start = known[f"{scheme}, rounding learned"] = work.accuracy(qmodel)
    facts = {"plan": plan_of(qmodel).to_dict(), "float": float_metrics, "known": known}
    # With progressive bit-width the start has more bits than it shall have, and says nothing of the end.
    return qmodel, session, facts | {"start": start if session.counts_from == 0 else None}


def _train_quantized(
    work: Work, qmodel: nn.Module, session: QATSession, header: dict[str, Any], *, resume: bool
) -> None:
    experiment = work.experiment
    run = Run(
        folder=work.folder,
        accelerator=work.accelerator,
        console=work.console,
        seed=experiment.seed,
        workers=experiment.data.workers,
        name=experiment.quantization.scheme,
    )
    trainer = Trainer(
        qmodel,
        work.datasets.train,
        experiment.training,
        run,
        task=work.task,
        validate=work.accuracy,
        save=lambda model, path, facts: save(model, path, facts | {"float": header["float"]}),
        callback=session,
        measured=header["known"],
        start=header.get("start"),
        header=header,
    )
    trainer.run(resume=resume)
