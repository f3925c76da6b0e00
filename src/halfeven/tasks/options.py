"""Which task an experiment has."""

from dataclasses import dataclass
from typing import Literal

from halfeven.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What the model's outputs are for: it decides the loss and the metrics."""

    kind: Literal["classification", "segmentation", "detection", "callable"] = "classification"
    """"classification" is for texts too; "callable": your own function, which returns a `halfeven.tasks.Task`."""
    function: str = ""
    """For "callable": "package.module:function", called with the number of classes."""
    ignore_index: int = 255
    """Label of pixels that do not count, in segmentation."""
    auxiliary_weight: float = 0.5
    """Weight of the auxiliary head's loss, where a segmentation model has one."""

    def __post_init__(self) -> None:
        if self.kind == "callable" and not self.function:
            raise ConfigError(
                'task.kind="callable" and no task.function: nothing says what the loss is. Write '
                '"package.module:function", a function that returns a halfeven.tasks.Task.'
            )
        if not 0 <= self.auxiliary_weight < float("inf"):
            raise ConfigError(
                f"task.auxiliary_weight={self.auxiliary_weight} would train the auxiliary head the wrong way round. "
                "Set it to 0 or more."
            )
