"""Quantization-aware training in the Trainer of Hugging Face's transformers."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from halfeven.imports import extra
from halfeven.integrations.session_steps import SessionSteps
from halfeven.layerwise.batchnorm_statistics import batchnorms
from halfeven.qat.session import QATSession

with extra("text", "The callback for transformers' Trainer"):
    import accelerate  # noqa: F401 (the Trainer imports it)
    from transformers import TrainerCallback


class QATCallback(SessionSteps, TrainerCallback):  # type: ignore[misc]
    """Calls a session's hooks in `transformers.Trainer.train`.

    Args:
        session: from `halfeven.pipelines.setup_qat`.
        qmodel: the quantized model, which the Trainer trains.
    """

    def __init__(self, session: QATSession, qmodel: nn.Module) -> None:
        super().__init__(session, qmodel)
        self._frozen: list[str] = []
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_trained(kwargs.get("model"))
        self.start(state.max_steps, state.global_step)
        self._remove_hook()
        # The Trainer calls `model.train()` in each micro-batch, after `on_step_begin`; that would undo the freezing.
        self._hook = self.qmodel.register_forward_pre_hook(self._freeze_again)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.qmodel.training:  # at first, and after a validation
            self.qmodel.train()
        self.before_step()
        self._frozen = [name for name, norm in batchnorms(self.qmodel).items() if not norm.training]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step(state.global_step)
        self._validates(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._validates(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove_hook()

    def _freeze_again(self, module: nn.Module, inputs: Any) -> None:
        # By name: `module` is a replica under DataParallel.
        if module.training:
            for name in self._frozen:
                module.get_submodule(name).eval()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _validates(self, control: Any) -> None:
        # The Trainer's own callback comes first, and has decided by now.
        if control.should_evaluate:
            self.before_validation()
