"""Notice NaN and infinity in a training before they are saved, and say where they began."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import HalfevenError
from halfeven.graph.parts import called_modules
from halfeven.graph.torch_private import pytree

NO_PLACE = 2**62
"""The place of a loss that is not finite, where there was none."""


class LossWatch:
    """Remembers, on the device, the first batch of a run whose loss was not finite.

    Nothing is read from the device until `first` is called, so that watching costs no wait.

    Args:
        device: the device of the losses.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._first = torch.tensor(NO_PLACE, device=device)
        self._loss = torch.zeros((), device=device)

    def see(self, loss: Tensor, place: int) -> None:
        """Look at the loss, [], of the batch at a place: its number since the start of the run."""
        loss = loss.detach().float()
        # The first alone: the losses after it are its consequence.
        found = ~torch.isfinite(loss) & (self._first == NO_PLACE)
        self._first = self._first.masked_fill(found, place)
        self._loss = torch.where(found, loss, self._loss)

    def first(self) -> int:
        """Return the place of the first batch whose loss was not finite; `NO_PLACE` if there was none."""
        return int(self._first)

    def loss(self) -> float:
        """Return the loss of that batch."""
        return float(self._loss)


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of the floating tensors that hold NaN or infinity, with one wait for each device."""
    found = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point() and t.numel()}
    if not found:
        return []
    bad: list[str] = []
    for device in {tensor.device for tensor in found.values()}:
        here = {name: tensor for name, tensor in found.items() if tensor.device == device}
        flags = torch.stack([torch.isfinite(tensor).all() for tensor in here.values()]).tolist()
        bad += [name for name, finite in zip(here, flags, strict=True) if not finite]
    return bad


def tensors_of(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a model's state dict, by name, and those of an optimizer's, named by their purpose."""
    kept = optimizer.get("state", {})
    moments = {f"the optimizer's {key} of parameter {i}": t for i, state in kept.items() for key, t in state.items()}
    return {**model, **moments}


def damage_in(state: Mapping[str, Any], optimizer: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """Return the names of a saved state's tensors that training has filled with NaN or infinity.

    Args:
        state: the model's state dict in the file.
        optimizer: the optimizer's state dict in the file.
        fresh: state dict of the model before the state is loaded. What is not finite there (the minus infinity of a
            mask) may be so in the file, except for scales: those of a new model are NaN until they are loaded.
    """
    usual = {name for name in not_finite(fresh) if not name.endswith(".scale")}
    return [name for name in not_finite(tensors_of(state, optimizer)) if name not in usual]


def bad_samples(items: Iterable[Any]) -> list[int]:
    """Return the numbers of the items, (input, target) pairs, that hold NaN or infinity."""
    return [number for number, item in enumerate(items) if not_finite(_numbered_leaves(item))]


def _numbered_leaves(value: Any) -> dict[str, Any]:
    return {str(number): leaf for number, leaf in enumerate(pytree.tree_leaves(value))}


def first_not_finite(objective: nn.Module, inputs: Any, targets: Any) -> str:
    """Compute a batch's loss and gradients, and name the first tensor that is not finite; "" if all are.

    The module is computed in its present mode, which moves BatchNorm's statistics, and its gradients are left at None.

    Args:
        objective: returns the loss of inputs and targets; its layers are searched in the order in which they run.
        inputs: of the batch.
        targets: of the batch.
    """
    found: list[str] = []
    try:
        with _outputs_watched(objective, found):
            loss = objective(inputs, targets)
        if found:
            return found[0]
        if not_finite({"loss": loss}):
            return "the loss"
        loss.backward()
        # Backward goes from the output to the input: of the parameters at fault, the last was met first.
        bad = not_finite({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
        return f"the gradient of {bad[-1].removeprefix('model.')}" if bad else ""
    except HalfevenError:  # a quantizer has refused the tensor that the layer before it computed
        return found[0] if found else ""
    finally:
        objective.zero_grad(set_to_none=True)


@contextmanager
def _outputs_watched(module: nn.Module, found: list[str]) -> Iterator[None]:
    """Append to `found`, within the context, each layer whose output is not finite."""

    def hook(name: str) -> Any:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not_finite(_numbered_leaves(output)):
                found.append(f"the output of {name.removeprefix('model.') or 'the model'} ({type(layer).__name__})")

        return look

    handles = [layer.register_forward_hook(hook(name)) for name, layer in called_modules(module) if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
