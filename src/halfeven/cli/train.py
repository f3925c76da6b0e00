"""`halfeven train`: quantization-aware training, from the float model to verified files."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checkpoint import save
from halfeven.cli.arguments import RunArguments
from halfeven.cli.deliver import deliver, write_plan
from halfeven.cli.float_model import check_has_weights, tell_own_weights, train_float
from halfeven.cli.preflight import check_training
from halfeven.cli.run import RunContext, open_run
from halfeven.cli.work_folder import (
    BEST_FILE,
    FLOAT_FOLDER,
    PTQ_STATE,
    check_folder,
    claimed_folder,
    default_folder,
    is_continued,
    remove_state,
)
from halfeven.distributed import world_size
from halfeven.errors import CheckpointError, HalfevenError
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import prepare, rebuild, resume_qat, setup_qat
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan_in_file import read_plan
from halfeven.qat.recipe import decide
from halfeven.qat.session import QATSession
from halfeven.training.accelerator import described_processes, mixed_precision
from halfeven.training.options import TrainingOptions
from halfeven.training.state import NO_RESUME, STATE_FILE, load_state
from halfeven.training.trainer import Trainer
from halfeven.zoo.models import create_model
from halfeven.zoo.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RunArguments):
    """Train the quantized form of a float model (QAT), write its deployable files and verify them."""

    amp: bool = False
    """Train in the mixed precision that the device has, bfloat16 or float16."""
    auto_scale_lr: bool = False
    """Multiply the learning rate by the batch over all processes / training.base_batch_size."""


def run_train(arguments: TrainArguments) -> None:
    """Train, export and verify, and print one table of accuracies."""
    experiment = arguments.experiment
    folder = default_folder(arguments.config, arguments.work_dir)
    # All that may refuse the run comes before its folder is claimed, and the cheapest check first.
    check_has_weights(experiment)
    if arguments.amp:
        device = dataclasses.replace(experiment.device, precision=mixed_precision())
        experiment = dataclasses.replace(experiment, device=device)
    context = open_run(experiment, folder)
    if arguments.auto_scale_lr:
        context = _with_scaled_rates(context)
    context.log(described_processes(context.accelerator.device))
    resume = is_continued(
        context, resume=arguments.resume, auto_resume=arguments.auto_resume, overwrite=arguments.overwrite
    )
    check_folder(context, "train", resume=resume, overwrite=arguments.overwrite)
    tell_own_weights(context)
    model = create_model(experiment.model)
    resume_training = resume and (folder / STATE_FILE).is_file()
    prepared = None if resume_training else check_training(context, model)
    with claimed_folder(context, "train", resume=resume):
        train_and_deliver(context, model, prepared, resume=resume, json_file=arguments.json)


def train_and_deliver(
    context: RunContext,
    model: nn.Module,
    prepared: nn.Module | None,
    *,
    resume: bool,
    facts: dict[str, Any] | None = None,
    json_file: str = "",
) -> None:
    """Train a quantized model, export and verify it, and print one table of accuracies.

    Args:
        context: the run, whose folder is claimed.
        model: the float model.
        prepared: the quantized model to start with; None: the interrupted training in the folder goes on.
        resume: a float model that was trained in the folder, whole or in part, belongs to this run.
        facts: further entries of `results.json`.
        json_file: a further file to write the results to; "" for none.
    """
    # An interrupted training goes on from its state; all others begin with calibration and the recipe.
    if prepared is None:
        qmodel, session, header = _rebuild_interrupted(context, model)
    else:
        qmodel, session, header = _set_up_training(context, model, prepared, resume=resume)
    _train_quantized(context, qmodel, session, header, resume=prepared is None)
    main = context.accelerator.is_main_process
    context.accelerator.end_training()  # what follows is the first process's alone
    if main:
        remove_state(context.folder, PTQ_STATE)
        deliver(context, model, header["float"], facts, calibrated=header.get("calibrated"), json=json_file)


def _with_scaled_rates(context: RunContext) -> RunContext:
    """Scale the learning rates, meant for `base_batch_size` samples, to the batch over all processes."""

    def scaled(options: TrainingOptions) -> TrainingOptions:
        batch = options.batch_size * options.accumulation * world_size()
        return dataclasses.replace(options, learning_rate=options.learning_rate * batch / options.base_batch_size)

    experiment = context.experiment
    for name in ("training", "pretraining"):
        before: TrainingOptions = getattr(experiment, name)
        changes: dict[str, Any] = {name: scaled(before)}
        experiment = dataclasses.replace(experiment, **changes)
        if before.epochs:
            rate: float = changes[name].learning_rate
            context.log(f"{name}.learning_rate: {before.learning_rate:g} scaled to {rate:g}.")
    return dataclasses.replace(context, experiment=experiment)


def _rebuild_interrupted(context: RunContext, model: nn.Module) -> tuple[nn.Module, QATSession, dict[str, Any]]:
    """Rebuild the quantized model of an interrupted training, except for its state, which the trainer loads."""
    state_file = context.folder / STATE_FILE
    header = _read_header(state_file)
    trained = context.folder / FLOAT_FOLDER / BEST_FILE
    if context.experiment.pretraining.epochs:
        load_weights(model, trained)
    # The plan that the run was started with: this version of halfeven might make another.
    plan = read_plan(json.dumps(header["plan"]), state_file)
    qmodel = rebuild(model, context.datasets.example(), plan).to(context.accelerator.device)
    loader, inputs = _calibration_loaders(context)
    qat = context.experiment.qat
    schedule = context.experiment.schedule
    recipe = decide(qmodel, qat, schedule)
    teacher = model.to(context.accelerator.device)
    session = resume_qat(qmodel, teacher, recipe, loader, qat, schedule, inputs, context.task.logits)
    return qmodel, session, header


def _read_header(path: Path) -> dict[str, Any]:
    """Return the facts about the model in the state of a quantized training."""
    try:
        header = json.loads(load_state(path).header)
        if isinstance(header, dict) and {"plan", "float"} <= header.keys():
            return header
    except (ValueError, RecursionError) as error:
        # A CheckpointError is a ValueError too, and says what is wrong with the file.
        if isinstance(error, HalfevenError):
            raise
    raise CheckpointError(f"{path} does not say how its model is quantized. {NO_RESUME}")


def _calibration_loaders(context: RunContext) -> tuple[Any, Callable[[], Any]]:
    """Return the calibration batches, and a function that gives batches for BatchNorm's statistics."""
    loader = context.loader(context.datasets.calibration, shared=False)
    return loader, lambda: loader


def _set_up_training(
    context: RunContext, model: nn.Module, qmodel: nn.Module, *, resume: bool
) -> tuple[nn.Module, QATSession, dict[str, Any]]:
    """Prepare the quantized model for its training. Its plan is printed before any long work."""
    experiment = context.experiment
    context.log(f"{plan_of(qmodel)}\n")
    write_plan(context, qmodel)
    # The float model is trained first; the model prepared before was for the checks and the plan alone.
    if context.experiment.pretraining.epochs:
        train_float(context, model, resume=resume)
        qmodel = prepare(model, context.datasets.example(), experiment.quantization)
    # Accuracies before the training, for the table and as the first model to beat.
    float_metrics = context.accuracy(model)
    loader, inputs = _calibration_loaders(context)
    scheme = context.selected_name(experiment.quantization.scheme)
    # The best checkpoint is chosen on the selection, so the model to beat is judged on it too.
    start = context.selection_accuracy(calibrate(qmodel.to(context.accelerator.device), loader))
    known = {"float": float_metrics, f"{scheme}, calibrated": start}
    # The table of results is of the validation samples; an accuracy on held-out samples has no place in it.
    calibrated = start if context.datasets.holdout is None else None
    if context.datasets.holdout is not None:
        known[context.selected_name("float")] = context.selection_accuracy(model)
    session = setup_qat(
        qmodel,
        model,
        loader,
        experiment.qat,
        experiment.schedule,
        ptq=experiment.ptq,
        inputs=inputs,
        log=context.log,
        resume_dir=context.folder / PTQ_STATE,
        logits=context.task.logits,
    )
    # Equalization and learned rounding change the model that the training starts from.
    if session.recipe.equalize.enabled and not session.recipe.reconstruct.enabled:
        start = known[f"{scheme}, equalized"] = context.selection_accuracy(qmodel)
    if session.recipe.reconstruct.enabled:
        start = known[f"{scheme}, rounding learned"] = context.selection_accuracy(qmodel)
    header = {
        "plan": plan_of(qmodel).to_dict(),
        "float": float_metrics,
        "calibrated": calibrated,
        "known": known,
        # With progressive bit-width the first model has more bits than the trained one, so it cannot be the best.
        "start": start if session.counts_from == 0 else None,
    }
    return qmodel, session, header


def _train_quantized(
    context: RunContext, qmodel: nn.Module, session: QATSession, header: dict[str, Any], *, resume: bool
) -> None:
    """Train the quantized model; its checkpoints and training state go to the work folder."""
    experiment = context.experiment
    run = context.place(context.folder, experiment.quantization.scheme)
    known = {"float": header["float"], "selection": experiment.data.selection}
    trainer = Trainer(
        qmodel,
        context.datasets.train,
        experiment.training,
        run,
        task=context.task,
        validate=context.selection_accuracy,
        save=lambda model, path, facts: save(model, path, facts | known),
        callback=session,
        measured=header["known"],
        start=header.get("start"),
        header=header,
    )
    trainer.run(resume=resume)
