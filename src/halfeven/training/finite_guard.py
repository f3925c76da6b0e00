"""Stop a training whose loss or weights are NaN or infinite before anything of it is saved, and say where it began."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from halfeven.distributed import is_distributed, smallest
from halfeven.errors import CalibrationError, ConfigError, named
from halfeven.training.finite import (
    NO_PLACE,
    LossWatch,
    bad_samples,
    first_not_finite,
    not_finite,
    tensors_of,
)
from halfeven.training.objective import Objective
from halfeven.training.sampling import TrainingBatches
from halfeven.training.state import load_state

RATE_ADVICE = "Lower training.learning_rate, or set training.clip_norm or training.warmup_steps."


class FiniteGuard:
    """Watches the losses of a run, and looks at its weights before they are saved.

    Args:
        objective: the model with its loss, not wrapped by Accelerate.
        optimizer: its state is looked at too: from infinite moments no weight would ever move again.
        batches: the training batches, of which the one at fault is read again.
        accumulation: batches of a step.
        state: the file of the last saved state.
        accelerator: device and processes of the run.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Any,
        batches: TrainingBatches,
        accumulation: int,
        state: Path,
        accelerator: Accelerator,
    ) -> None:
        self.objective = objective
        self.model = objective.model
        self.optimizer = optimizer
        self.batches = batches
        self.accumulation = accumulation
        self.steps_per_epoch = -(-len(batches) // accumulation)
        self.state = state
        self.accelerator = accelerator
        self.watch = LossWatch(accelerator.device)
        # The minus infinity of a mask, for example.
        self.usual = set(not_finite(self.model.state_dict()))

    def see(self, loss: Tensor, step: int, batch: int) -> None:
        """Look at the loss, [], of a batch of a step (both from 0), without a wait for the device."""
        self.watch.see(loss, step * self.accumulation + batch)

    @contextmanager
    def explained(self, step: int, batch: int) -> Iterator[None]:
        """Turn a quantizer's refusal of NaN, within the context, into an error that names step, batch and tensor."""
        try:
            yield
        except CalibrationError as error:
            place = step * self.accumulation + batch
            began = self._first_bad_tensor(place)
            if began is None:
                raise
            raise ConfigError(
                f"Training met NaN or infinity at {self._position_text(place)}, and training on would fill all weights "
                f"with it. {began} {self._saved_text()}"
            ) from error

    def check(self, step: int, rate: float) -> None:
        """Look at all losses since the last check, and at all weights. Every process calls this at the same steps.

        Args:
            step: number of steps taken.
            rate: learning rate of the last of them.

        Raises:
            ConfigError: a loss or a weight is NaN or infinite, in any process.
        """
        place = self.watch.first()
        tensors = tensors_of(self.model.state_dict(), self.optimizer.state_dict())
        bad = [name for name in not_finite(tensors) if name not in self.usual]
        # Weights that are at fault without any loss come last; their batch is the last.
        mine = place if place < NO_PLACE else NO_PLACE - 1 if bad else NO_PLACE
        first = smallest(mine, self.accelerator.device)
        if first == NO_PLACE:
            return
        # The process at fault tells the others, so that all end with the same error.
        told = gather_object([self._error_text(place, bad, step, rate) if mine == first else ""])
        raise ConfigError(next(text for text in told if text))

    def _error_text(self, place: int, bad: list[str], step: int, rate: float) -> str:
        if place < NO_PLACE:
            what = f"The loss became {self.watch.loss()} at {self._position_text(place)}, learning rate {rate:g}"
        else:
            what = f"Training has filled {named(bad)} with NaN or infinity by step {step}, learning rate {rate:g}"
            place = step * self.accumulation - 1
        began = self._first_bad_tensor(place)
        if began is None:
            grown = f" ({named(bad)})" if bad else ""
            began = (
                f"With the weights saved before, this batch gives finite numbers: the weights{grown} have grown since. "
                f"{RATE_ADVICE}"
            )
        return f"{what}; all weights after it would be NaN. {began} {self._saved_text()}"

    def _position_text(self, place: int) -> str:
        # A place counts `accumulation` batches for every step, also where the last step of an epoch had fewer.
        step, batch = divmod(place, self.accumulation)
        epoch, within = divmod(step, self.steps_per_epoch)
        number = within * self.accumulation + batch + 1
        return f"step {step + 1} (epoch {epoch + 1}, batch {number} of {len(self.batches)})"

    def _first_bad_tensor(self, place: int) -> str | None:
        """Say which tensor of a batch is the first that is not finite, with the last saved weights; None: all are."""
        step, batch = divmod(place, self.accumulation)
        epoch, within = divmod(step, self.steps_per_epoch)
        number = within * self.accumulation + batch
        indices = self.batches.indices(epoch, number)
        items = self.batches.items(epoch, number)
        if bad := [self.batches.describe(indices[i]) for i in bad_samples(items)]:
            return (
                f"The first tensor that holds NaN or infinity is the batch itself, by training sample {named(bad)} "
                "(counted from 0). Mend it in the data."
            )
        # The present weights may be NaN by now. Those of the last saved state were finite.
        if self.state.is_file():
            self.model.load_state_dict(load_state(self.state).model)
        device = self.accelerator.device
        inputs, targets = send_to_device(self.batches.collate(items), device)
        self.objective.run_uncompiled()  # the layers are watched by hooks
        # Layers that exchange statistics in training mode would wait for processes that are not here.
        self.objective.train(not is_distributed())
        with torch.enable_grad(), self.accelerator.autocast():
            found = first_not_finite(self.objective, inputs, targets)
        return (
            f"The first tensor that holds NaN or infinity is {found}, computed of finite samples. {RATE_ADVICE}"
            if found
            else None
        )

    def _saved_text(self) -> str:
        if not self.state.is_file():
            return "Nothing was saved."
        return f"{self.state} still holds step {load_state(self.state).step}, from which --resume goes on."
