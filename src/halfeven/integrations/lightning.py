"""Quantization-aware training in Lightning's Trainer."""

import math
from typing import Any

from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.integrations.session_steps import SessionSteps

with extra("lightning", "The callback for Lightning"):
    from lightning.pytorch.callbacks import Callback


class QATCallback(SessionSteps, Callback):  # type: ignore[misc]
    """Calls a session's hooks in `lightning.Trainer.fit`.

    Args:
        session: from `halfeven.pipelines.setup_qat`.
        qmodel: the quantized model, which your LightningModule trains.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.check_trained(pl_module)
        # Lightning trains in the mode that a model comes in, and `prepare` and a measured accuracy leave eval mode.
        if not self.qmodel.training:
            self.qmodel.train()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if total == math.inf:
            raise ConfigError(
                "The Trainer does not know the number of its steps, and the recipe acts at shares of the run. Give "
                "lightning.Trainer max_steps."
            )
        self.start(int(total), trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_step(trainer.global_step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # Lightning validates a few batches before the training begins, as a test of the code.
        if not trainer.sanity_checking:
            self.before_validation()
