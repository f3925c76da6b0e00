"""The deployed model as an ATen program, traced on the example that it was prepared with."""

from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import ExportError
from halfeven.graph.capture import quiet
from halfeven.graph.torch_private import pytree
from halfeven.placement.insertion import recorded_example


def example_of(qmodel: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example input that a quantized model was prepared with, on the CPU.

    Raises:
        ExportError: the model carries none.
    """
    example = recorded_example(qmodel)
    if example is None:
        raise ExportError(
            "This model carries no example input, so it cannot be traced. Export what halfeven.prepare or "
            "halfeven.load returned."
        )
    return example


def exported_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Return a model as an ATen program in which the first axis of each tensor is free, except where it is 1."""

    def free_batch(x: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.ndim and len(x) != 1 else None

    shapes = pytree.tree_map(free_batch, (args, tuple(kwargs.values())))
    names = dict(zip(kwargs, shapes[1], strict=True))
    with quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=names if kwargs else shapes[0], strict=False)
