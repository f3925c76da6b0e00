"""The training loop on Accelerate: float or quantized models, one process or many; a resumed run equals a whole one."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_batch_size, gather_object, send_to_device
from torch import Tensor, nn

from halfeven.distributed import differing, is_distributed, rank, world_size
from halfeven.errors import CheckpointError, named
from halfeven.files import write_atomically
from halfeven.layerwise.batchnorm_statistics import average_batchnorm, own_statistics, set_own_statistics
from halfeven.quantization.model_quantizers import weights_quantized_once
from halfeven.tasks import Task
from halfeven.tasks.task import Metrics
from halfeven.training.callback import TrainerCallback, check_final_form, is_in_final_form
from halfeven.training.finite import damage_in
from halfeven.training.finite_guard import FiniteGuard
from halfeven.training.objective import Objective
from halfeven.training.optimization import learning_rate, make_optimizer
from halfeven.training.options import TrainingOptions
from halfeven.training.progress import RunLog
from halfeven.training.run import Run as Run
from halfeven.training.run import TrainingResult
from halfeven.training.sampling import TrainingBatches, mix, seed_generators
from halfeven.training.state import STATE_FILE, TrainingState, check_position, explaining_misfit, load_state, save_state
from halfeven.training.stopping import StopRequested, deferred

PERFECT_METRIC = 100.0
"""Largest value of a metric, in percent: no advice helps beyond it."""


class Trainer:
    """Trains a model in place.

    Args:
        model: the model.
        samples: training data, pairs of input and target by index.
        options: optimizer, schedule and length.
        run: where the run takes place.
        task: makes batches and the loss, and names the metric that decides on the best model.
        validate: returns a model's accuracy; called on every process at each validation.
        save: writes a checkpoint of a model to a path, with facts about it; called on the first process.
        callback: the method that the model is trained by.
        measured: accuracies measured before, by name, which are logged at step 0; for example the float model's.
        start: accuracy of the model as it is given: it is the best until training reaches as much. None: the first
            validation is the best so far.
        header: JSON-able facts that the caller needs, besides the training state, to make the model anew when the run
            is resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Any,
        options: TrainingOptions,
        run: Run,
        *,
        task: Task,
        validate: Callable[[nn.Module], Metrics],
        save: Callable[[nn.Module, Path, dict[str, Any]], None],
        callback: TrainerCallback | None = None,
        measured: Mapping[str, Metrics] | None = None,
        start: Metrics | None = None,
        header: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.where = run
        self.task = task
        self.validate = validate
        self.save = save
        self.callback = callback or TrainerCallback()
        self.measured = measured or {}
        self.start = start
        self.header = json.dumps(header or {})
        self.batches = TrainingBatches(
            samples, options, seed=run.seed, workers=run.workers, prefetch=run.prefetch, collate=task.collate
        )
        # Rounded up: the last group of an epoch may have fewer batches.
        self.steps_per_epoch = -(-len(self.batches) // options.accumulation)
        whole = options.epochs * self.steps_per_epoch
        self.total_steps = whole if options.max_steps == "auto" else min(options.max_steps, whole)
        check_final_form(self.callback, self.total_steps)
        self.step = 0
        self.rate = 0.0
        self.best = Metrics()
        self.trained = False
        self.last = Metrics()
        self.accelerator = run.accelerator
        model.to(self.accelerator.device)
        # After `model.to`, which may replace the parameters that the optimizer holds.
        self.optimizer = self.accelerator.prepare(make_optimizer(model, options))
        # The number of samples is part of the order: with another number every epoch is shuffled otherwise.
        self.position = {
            "seed": run.seed,
            "images": len(samples),
            "batch_size": options.batch_size,
            "accumulation": options.accumulation,
            "processes": world_size(),
        }

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train to the end, from the start or from the state in the folder.

        Args:
            resume: True to go on from the state in the folder.

        Raises:
            CheckpointError: the state cannot be resumed, or the processes have come to different models.
            StopRequested: a signal has asked to stop (`halfeven.training.stopping`); the state is saved.
            ConfigError: the loss or a weight became NaN or infinite. The state before it stays in the folder.
        """
        if resume:
            self._resume_state()
        objective = Objective(
            self.model,
            self.task,
            self.options.label_smoothing,
            self.callback,
            channels_last=self.where.channels_last,
            compiled=self.where.compiled,
        )
        state_file = self.where.folder / STATE_FILE
        self.guard = FiniteGuard(
            objective, self.optimizer, self.batches, self.options.accumulation, state_file, self.accelerator
        )
        self.objective = self.accelerator.prepare(objective)
        self.log = RunLog(
            self.where.folder,
            f"Training {self.where.name}",
            total=self.total_steps,
            step=self.step,
            resumed=resume,
            console=self.where.console,
            main=self.accelerator.is_main_process,
            constants=self.measured,
        )
        try:
            if not resume:
                for name, metrics in self.measured.items():
                    self.log.validation(0, 0, name, metrics)
                if self.start is not None:
                    # A run that never beats its start keeps it as the best.
                    self._write_best(self.model, self.start, 0, self.where.name, trained=False)
                # Saved before the first step too, so that a resumed run need not calibrate and learn rounding again.
                self._save_state()
            with deferred() as self.safe_points:
                while self.step < self.total_steps:
                    self._train_epoch(self.step // self.steps_per_epoch)
        finally:
            self.log.close()
        if self.best and not self.trained:
            best = self.best[self.task.key]
            advice = " A lower training.learning_rate or a longer run may help." if best < PERFECT_METRIC else ""
            self.where.console.print(
                f"No validation reached the {best:.2f} % that training started from (the last: "
                f"{self.last[self.task.key]:.2f} %): the start is kept as the best.{advice}",
                highlight=False,
            )
        return TrainingResult(best=self.best, last=self.last, steps=self.step)

    def _train_epoch(self, epoch: int) -> None:
        self.model.train()
        # A resumed run begins in the middle of an epoch, at the batch where it was interrupted.
        start = self.step % self.steps_per_epoch * self.options.accumulation
        for group in self._batches_by_step(self.batches.epoch(epoch, start)):
            # Train a step, log it, then validate and save where that is due.
            loss, self.rate = self._take_step(group)
            self.step += 1
            self.log.advance(self.step, sum(find_batch_size(inputs) for inputs, _ in group) * world_size())
            if self.step % self.options.log_every == 0 or self.step == self.total_steps:
                self._log_loss(epoch, loss)
            ends = self.step == self.total_steps or self.step % self.steps_per_epoch == 0
            # The state is saved after a validation, which a resumed run must not skip.
            if ends or self._is_validation_due():
                # Before anything is written: NaN must not replace a good checkpoint or state.
                self.guard.check(self.step, self.rate)
                self._finish_epoch(epoch)
                # `max_steps` may end the run in the middle of an epoch, whose other batches are not read.
                if ends:
                    break
                self.model.train()
                continue
            stop = self.safe_points.reason(self.step, self.accelerator.device)
            if stop or self.step % self.options.save_every == 0:
                self.guard.check(self.step, self.rate)
                self._save_state(stopping=bool(stop))
            if stop:
                raise StopRequested(stop, self.step)

    def _is_validation_due(self) -> bool:
        """Return True where a validation is due after the present step."""
        every = self.options.validate_every
        return self.step == self.total_steps or self.step % (self.steps_per_epoch if every == "auto" else every) == 0

    def _batches_by_step(self, batches: Iterator[Any]) -> Iterator[list[tuple[Any, Any]]]:
        """Yield the batches of each optimizer step; the last group of an epoch may be smaller."""
        group: list[tuple[Any, Any]] = []
        for inputs, targets in batches:
            group.append((inputs, targets))
            if len(group) == self.options.accumulation:
                yield group
                group = []
        if group:
            yield group

    def _take_step(self, group: list[tuple[Any, Any]]) -> tuple[Tensor, float]:
        """Take an optimizer step on the mean gradient of a group of batches. Returns its loss and learning rate."""
        # The model's random numbers (dropout, and what its own code draws from Python or NumPy) depend on the step
        # alone and not on what was drawn before: no generator's state needs saving, and a resumed run draws the same.
        seed_generators(mix(self.where.seed, self.step, rank()))
        self.callback.before_step(self.model, self.step / self.total_steps)
        rate = learning_rate(self.step, self.total_steps, self.steps_per_epoch, self.options)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters.get("rate", 1.0)
        # The weights do not change between the batches of a step: quantizing them once saves a pass over them per
        # batch.
        with weights_quantized_once(self.model) if len(group) > 1 else contextlib.nullcontext():
            total = self._accumulate(group)
        # Behind the exchange of gradients, so that all processes shorten the same gradient by the same factor.
        if self.options.clip_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.callback.after_step(self.step, (self.step + 1) / self.total_steps)
        return total, rate

    def _accumulate(self, group: list[tuple[Any, Any]]) -> Tensor:
        """Add the mean gradient of a group of batches to the parameters' `grad`. Returns the mean loss, []."""
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        for i, batch in enumerate(group):
            # The processes exchange gradients once, with the last batch of the group.
            last = i == len(group) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                with self.guard.explained(self.step, i):
                    loss = self.objective(*send_to_device(batch, device, non_blocking=True))
                penalty = self.callback.penalty(self.step / self.total_steps)
                loss = loss if penalty is None else loss + penalty
                # Divided here, so that gradients add up to the mean over the group.
                self.accelerator.backward(loss / len(group))
            self.guard.see(loss, self.step, i)
            # A tensor on the device: `float(loss)` in each step would wait for the device.
            total += loss.detach() / len(group)
        return total

    def _log_loss(self, epoch: int, loss: Tensor) -> None:
        # Reading the number waits for the device, so it is read every `log_every` steps only.
        value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            self.guard.check(self.step, self.rate)
        self.log.training(self.step, epoch + 1, value, self.rate, self.callback.figures())

    def _finish_epoch(self, epoch: int) -> None:
        """Validate where it is due, and save the state, at the end of an epoch or at a validation within it."""
        if self._is_validation_due():
            self.last = self._validate(self.model, epoch, self.where.name, "last")
            self.log.histograms(self.step, self.callback.histograms())
            for name, model in self.callback.other_models.items():
                self._validate(model, epoch, f"{self.where.name}, {name}")
        self._save_state()
        if stop := self.safe_points.reason(self.step, self.accelerator.device, exchange=True):
            raise StopRequested(stop, self.step)

    def _validate(self, model: nn.Module, epoch: int, name: str, file: str = "") -> Metrics:
        """Validate a model, write it to `file` and, where it is better than all before, as the best."""
        # Each process has the BatchNorm statistics of its own samples: without this, one process's model would be
        # judged.
        average_batchnorm(model)
        self.callback.before_validation(model)
        metrics = self.validate(model)
        self.log.validation(self.step, epoch + 1, name, metrics)
        counts = is_in_final_form(self.callback, self.step, self.total_steps)
        if counts and self._is_best(metrics):
            self._write_best(model, metrics, epoch + 1, name)
        if counts and file:
            self._write_checkpoint(model, file, {"step": self.step, "epoch": epoch + 1, name: metrics})
        return metrics

    def _is_best(self, metrics: Metrics) -> bool:
        """Return True for the best metrics so far, and for a trained model as good as an untrained best one."""
        if not self.best:
            return True
        reached = metrics[self.task.key]
        best = self.best[self.task.key]
        # Any number is better than NaN, such as the metric of classes that no sample has.
        return reached > best or math.isnan(best) or (reached == best and not self.trained)

    def _write_best(self, model: nn.Module, metrics: Metrics, epoch: int, name: str, *, trained: bool = True) -> None:
        self.best = metrics
        self.trained = trained
        self._write_checkpoint(model, "best", {"step": self.step, "epoch": epoch, name: metrics})

    def _write_checkpoint(self, model: nn.Module, file: str, facts: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            path = self.where.folder / f"{file}.safetensors"
            write_atomically(path, lambda partial: self.save(model, partial, facts))

    def _save_state(self, *, stopping: bool = False) -> None:
        """Save the training state.

        Args:
            stopping: a signal ends the run here; else every run with these options saves at this step.
        """
        models = (self.model, *self.callback.other_models.values())
        own: list[dict[str, Tensor]] = []
        if stopping and is_distributed():
            # A run that is not stopped does not average here: each process goes on from statistics of its own.
            own = gather_object([own_statistics(models)])
        for model in models:
            average_batchnorm(model)
        # Only the first process writes its model, so that all must have the same.
        if different := differing(self.model):
            raise CheckpointError(
                f"After step {self.step} the processes of this run have different models ("
                f"{', '.join(different[:5])}), so none of them stands for all. Look for a module of that name, or a "
                "callback, that keeps statistics without exchanging them, or train on one process."
            )
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = TrainingState(
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=scaler.state_dict() if scaler is not None else {},
                step=self.step,
                best=self.best,
                trained=self.trained,
                last=self.last,
                position=self.position,
                header=self.header,
                others={name: kept.state_dict() for name, kept in self.callback.stateful.items()}
                | {_statistics_of(number): statistics for number, statistics in enumerate(own)},
            )
            save_state(state, self.where.folder / STATE_FILE)
        # No process may train on, or end, before the file is complete.
        self.accelerator.wait_for_everyone()

    def _resume_state(self) -> None:
        path = self.where.folder / STATE_FILE
        state = load_state(path)
        check_position(state.position, self.position, path)
        if damaged := damage_in(state.model, state.optimizer, self.model.state_dict()):
            raise CheckpointError(
                f"The state in {path}, of step {state.step}, holds NaN or infinity in {named(damaged)}, so training "
                "cannot go on from it: the loss had become NaN before it was saved. best.safetensors beside it is from "
                "before. Start anew with --overwrite or in another --work-dir, with a lower training.learning_rate if "
                "the data are right."
            )
        with explaining_misfit(path):
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
            for name, kept in self.callback.stateful.items():
                kept.load_state_dict(state.others[name])
            # The order in which `own_statistics` has listed them when the state was saved.
            models = (self.model, *self.callback.other_models.values())
            set_own_statistics(models, state.others.get(_statistics_of(rank()), {}))
        self.step = state.step
        self.best = state.best
        # Files of earlier versions do not say it: another best than the start is a trained one.
        self.trained = state.best != (self.start or {}) if state.trained is None else state.trained
        self.last = state.last
        self.where.console.print(f"Resumed {path} at step {self.step} of {self.total_steps}.", highlight=False)


def _statistics_of(process: int) -> str:
    return f"statistics of process {process}"
