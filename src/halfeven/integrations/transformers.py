"""Quantization-aware training in the Trainer of Hugging Face's transformers."""

from typing import Any

from halfeven.imports import extra
from halfeven.integrations.session_steps import SessionSteps

with extra("text", "The callback for transformers' Trainer"):
    from transformers import TrainerCallback


class QATCallback(SessionSteps, TrainerCallback):  # type: ignore[misc]
    """Calls a session's hooks in `transformers.Trainer.train`.

    Args:
        session: from `halfeven.pipelines.setup_qat`.
        qmodel: the quantized model, which the Trainer trains.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step(state.global_step)
        self._validates(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._validates(control)

    def _validates(self, control: Any) -> None:
        # The Trainer's own callback comes first, and has decided by now.
        if control.should_evaluate:
            self.before_validation()
