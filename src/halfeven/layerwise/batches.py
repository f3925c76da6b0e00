"""Read the batches of a loader for a model: on its device, checked against the example that it was prepared with."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CalibrationError, ConfigError, HalfevenError, InputError, last_line
from halfeven.evaluation import evaluating
from halfeven.graph.batches import (
    InputForm,
    Inputs,
    by_name,
    given_batches,
    input_form,
    inputs_of,
    is_label,
    is_sequence,
    tensors_of,
)
from halfeven.graph.torch_private import pytree
from halfeven.graph.wrappers import unwrapped
from halfeven.placement.insertion import recorded_entries, recorded_example


def read_inputs(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> Iterator[Inputs]:
    """Yield the arguments of each batch, (positional, keyword), for a model.

    Args:
        model: a model from `prepare`, whose example says which entries of a batch are inputs; or any module.
        loader: batches as `inputs_of` takes them.
        batches: largest number of batches to read; None: all.

    Raises:
        CalibrationError: a batch does not fit the example.
        ConfigError: the model has no example, and a batch does not show which of its entries are inputs.
    """
    form = None
    for number, batch in enumerate(given_batches(loader, batches)):
        form = form or form_of(model, batch)
        yield inputs_of(batch, form, number)


@contextmanager
def naming_batch(number: int) -> Iterator[None]:
    """Say, in an error about the sizes of inputs, which batch of the loader they came in.

    Args:
        number: the batch's place, counted from 0.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"Batch {number} (counted from 0): {error}") from error


@contextmanager
def computing_batch(number: int, inputs: Inputs) -> Iterator[None]:
    """Say, in an error of the model's own code, which batch of the loader it could not compute.

    Args:
        number: the batch's place, counted from 0.
        inputs: the arguments of the model.
    """
    try:
        with naming_batch(number):
            yield
    except (HalfevenError, Warning):
        raise
    except Exception as error:
        told = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors_of(inputs))
        raise CalibrationError(
            f"The model cannot compute batch {number} (counted from 0) of the loader, whose inputs are {told}: "
            f"{type(error).__name__}: {last_line(error).rstrip('.')}. So nothing is known about its tensors. Give "
            "batches that the float model computes, with the values of real data."
        ) from error


def on_device(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the arguments with their tensors on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved: Inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)
    return moved


def form_of(model: nn.Module, batch: Any) -> InputForm:
    """Return how a model takes its inputs: as in the example that it was prepared with, or else as in a batch."""
    return input_form(model, recorded_example(model) or inputs_in(model, batch), recorded_entries(model))


def inputs_in(model: nn.Module, batch: Any) -> Inputs:
    """Return the arguments in a batch for a model without an example, judged by the parameters of its forward.

    A dict gives the parameters of its names, without labels that may be left out; so do a dataclass, and a named tuple
    with all names that the model requires. A sequence gives as many inputs as the model requires. Where it could give
    optional ones too, the model is run with and without them.

    Raises:
        ConfigError: the model runs with and without the optional inputs.
    """
    model = unwrapped(model)  # a wrapper's forward takes anything
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    batch = by_name(batch, required)
    if isinstance(batch, Mapping):
        return (), _accepted_arguments(batch, parameters)
    if not is_sequence(batch):
        return (batch,), {}
    # (inputs, label): the inputs are a dict, a dataclass or a sequence of their own.
    if batch and isinstance(by_name(batch[0], required), Mapping):
        return inputs_in(model, batch[0])
    if batch and is_sequence(batch[0]):
        return tuple(batch[0]), {}
    return _leading_inputs(model, batch, parameters), {}


def _accepted_arguments(batch: Mapping[str, Any], parameters: Iterable[inspect.Parameter]) -> dict[str, Any]:
    known = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    # A forward that takes any keyword would take labels for inputs, too, unless it names them.
    labels = {name for name, p in known.items() if is_label(p)} | ({"label", "labels"} - known.keys())
    return {name: value for name, value in batch.items() if name not in labels and (takes_any or name in known)}


def _leading_inputs(model: nn.Module, batch: Sequence[Any], parameters: Iterable[inspect.Parameter]) -> tuple[Any, ...]:
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = max(sum(p.default is p.empty for p in positional), 1)
    # Parameters that default to None may take further tensors of the batch, up to the first label.
    possible = required
    for parameter, entry in zip(positional[required:], batch[required:], strict=False):
        if parameter.default is not None or is_label(parameter) or not isinstance(entry, Tensor):
            break
        possible += 1
    counts = range(min(required, len(batch)), min(possible, len(batch)) + 1)
    # A single possibility needs no run. Of several, the model itself tells which it takes; where it takes more than
    # one, the batch does not say what it means.
    runs = [count for count in counts if len(counts) == 1 or _runs_with(model, batch[:count])]
    if len(runs) > 1:
        names = [p.name for p in positional[: runs[-1]]]
        raise ConfigError(
            f"A batch of the loader has {len(batch)} entries, and the model runs with the first {runs[0]} as inputs as "
            f"well as with the first {runs[-1]} ({', '.join(names)}), so it is not known whether the rest is inputs or "
            f"labels. Show the inputs by an example: example=batch[0], or example=tuple(batch[:{runs[-1]}])."
        )
    return tuple(batch[: runs[0] if runs else counts[0]])


@torch.no_grad()
def _runs_with(model: nn.Module, entries: Sequence[Any]) -> bool:
    args, _ = on_device(model, (tuple(entries), {}))
    with evaluating(model):
        try:
            model(*args)
        except Exception:  # any kind: this model does not take these inputs
            return False
    return True
