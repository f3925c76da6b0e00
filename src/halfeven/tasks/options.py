"""The task of an experiment."""

from dataclasses import dataclass
from typing import Literal

from halfeven.errors import ConfigError
from halfeven.options import NonNegativeFloat, Options


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """The task of the model: it decides the loss and the metrics."""

    kind: Literal["classification", "segmentation", "detection", "callable"] = "classification"
    """"classification" is for texts too; "callable": your own function, which returns a `halfeven.tasks.Task`."""
    function: str = ""
    """For "callable": "package.module:function", called with the number of classes."""
    ignore_index: int = 255
    """Label of pixels that do not count, in segmentation."""
    auxiliary_weight: NonNegativeFloat = 0.5
    """Weight of the auxiliary head's loss, where a segmentation model has one."""

    def __post_init__(self) -> None:
        if self.kind == "callable" and not self.function:
            raise ConfigError(
                'task.kind="callable" and no task.function: nothing says what the loss is. Write '
                '"package.module:function", a function that returns a halfeven.tasks.Task.'
            )
        for name, kind in (
            ("function", "callable"),
            ("ignore_index", "segmentation"),
            ("auxiliary_weight", "segmentation"),
        ):
            if self.kind != kind and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(
                    f'task.{name}={getattr(self, name)!r} would have no effect with task.kind="{self.kind}". Leave it '
                    f'out, or set task.kind="{kind}".'
                )
