"""Dropout in a run of a model: switched off, and its calls recorded with the probabilities of training mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from halfeven.graph.operators import is_stochastic_depth
from halfeven.graph.torch_private import AnyDropout

ATTENTION = "scaled_dot_product_attention"
DROPOUT_ARGUMENT = {ATTENTION: 4, "multi_head_attention_forward": 10}
"""The place of `dropout_p` among the arguments of functions that contain a dropout."""
TRAINING_ARGUMENT = 13
"""The place of `training` among the arguments of the second."""


@dataclass(frozen=True)
class DropoutCall:
    """A call of a function for dropout, or of torch's function for attention, which contains one."""

    path: str
    """The module whose own code calls it; "" for the model."""
    probability: float
    is_attention: bool = False


@dataclass
class DropoutCalls:
    """The calls of a run, in their order."""

    found: list[DropoutCall] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    """The names of the modules that are running, from the model inwards."""

    def add(self, probability: float, is_attention: bool = False) -> None:
        """Add a call of the module that is running."""
        self.found.append(DropoutCall(self.modules[-1] if self.modules else "", probability, is_attention))

    def leave(self) -> None:
        """Return from the module that is running."""
        self.modules.pop()


def switch_off_dropout(model: nn.Module) -> None:
    """Put the modules for dropout and stochastic depth, whose randomness the captured model has too, in eval mode."""
    for module in model.modules():
        if isinstance(module, AnyDropout) or is_stochastic_depth(module):
            module.eval()
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0


@contextmanager
def functions_without_dropout(calls: DropoutCalls) -> Iterator[None]:
    """Replace torch's functions by their form without dropout, within the context, and record their calls.

    A mode of torch does not reach what checkpointing computes again in the backward pass.
    """
    found = {
        name: value
        for name, value in vars(functional).items()
        if callable(value) and not name.startswith("_") and ("dropout" in name or name in DROPOUT_ARGUMENT)
    }
    try:
        for name, value in found.items():
            setattr(functional, name, partial(_without_dropout, calls, value))
        yield
    finally:
        for name, value in found.items():
            setattr(functional, name, value)


def _without_dropout(calls: DropoutCalls, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the input of a dropout, and the result of a function with `dropout_p` for 0."""
    name = getattr(func, "__name__", "")
    if "dropout" in name and not isinstance(func, type):
        calls.add(_dropout_probability(name, args, kwargs))
        return args[0] if args else kwargs["input"]
    place = DROPOUT_ARGUMENT.get(name)
    if place is None:
        return func(*args, **kwargs)
    given = args[place] if len(args) > place else kwargs.get("dropout_p", 0.0)
    if len(args) > place:
        args = (*args[:place], 0.0, *args[place + 1 :])
    else:
        kwargs = {**kwargs, "dropout_p": 0.0}
    count = len(calls.found)
    result = func(*args, **kwargs)
    # The call may have met this function again, without its dropout.
    del calls.found[count:]
    calls.add(given if _is_training(args, kwargs) else 0.0, is_attention=True)
    return result


def _is_training(args: Any, kwargs: Any) -> bool:
    """Return the mode that torch's function for a whole attention layer is given; that for its core has none."""
    return bool(args[TRAINING_ARGUMENT] if len(args) > TRAINING_ARGUMENT else kwargs.get("training", True))


def _dropout_probability(name: str, args: Any, kwargs: Any) -> float:
    """Return the probability that a function for dropout was called with, 0 outside of training."""
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    # torch.dropout's own mode is called "train", and functions for alpha dropout are those of eval mode by default.
    training = given.get("training", given.get("train", "alpha" not in name))
    return float(given.get("p", 0.5)) if training else 0.0


class WithoutDropout(TorchFunctionMode):
    """Makes functions for dropout return their input, and attention compute without dropout."""

    def __init__(self, calls: DropoutCalls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _without_dropout(self.calls, func, *args, **(kwargs or {}))
