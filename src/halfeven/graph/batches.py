"""Read the batches of a loader: which entries are a model's inputs, which the label, and whether they fit the example.

The example that a model was prepared with decides. A sequence gives as many inputs as the example has, then the label;
a dict, a dataclass or a named tuple gives the inputs that the example names, and may hold others.
"""

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CalibrationError, ConfigError, HalfevenError, last_line
from halfeven.graph.single_samples import MAKE_BATCHES, check_gives_batches
from halfeven.graph.torch_private import pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a model in the form that users give: one tensor, positional arguments, or keyword arguments."""

LABEL_NAMES = ("target", "targets", "start_positions", "end_positions")
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys of a dict under which a batch may have its label, the likeliest first."""


@dataclass(frozen=True)
class InputForm:
    """The inputs that a model takes."""

    args: tuple[Any, ...]
    """Positional arguments of the example."""
    kwargs: Mapping[str, Any]
    """Keyword arguments of the example."""
    names: tuple[str, ...]
    """Names of the positional arguments."""
    converted: torch.dtype | None = None
    """The type of a model whose weights are no longer in float32, such as after `model.bfloat16()`."""
    entries: tuple[str, ...] = ()
    """Names of the entries of a sequence, in their order, where labels stand between the inputs, which are then keyword
    arguments; () elsewhere."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of the inputs that hold tensors."""
        inputs = (*zip(self.names, self.args, strict=True), *self.kwargs.items())
        return tuple(name for name, like in inputs if _holds_tensors(like))

    @property
    def expected(self) -> str:
        """Return the inputs for a message."""
        names = [*self.names, *self.kwargs]
        return f"{len(names)} input{'s' * (len(names) != 1)} ({', '.join(names)})"


def by_name(batch: Any, names: Iterable[str]) -> Any:
    """Return a dataclass as the dict of its fields, a named tuple too if it has all these names; else the batch."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fields = getattr(batch, "_fields", ()) if isinstance(batch, tuple) else ()
    return dict(zip(fields, batch, strict=True)) if fields and {*names} <= {*fields} else batch


def given_batches(loader: Iterable[Any], batches: int | None = None, name: str = "loader") -> Iterator[Any]:
    """Yield the batches of a user's loader.

    Args:
        loader: anything to iterate over.
        batches: largest number of batches to read; None: all.
        name: the argument that the loader was given as, for messages.

    Raises:
        CalibrationError: the loader raised an error, which is the cause of this one; or it is a data set of samples.
        ConfigError: `batches` is below zero.
    """
    if batches is not None and batches < 0:
        raise ConfigError(
            f"batches={batches} is below zero, so no batch can be read. Give a number above zero, or None."
        )
    number = 0
    try:
        for batch in loader if batches is None else islice(loader, batches):
            if number == 0:
                check_gives_batches(loader, batch, name)
            yield batch
            number += 1
    except (HalfevenError, Warning):
        raise
    except Exception as error:  # data sets are the user's code, and raise what they like
        raise CalibrationError(
            f"The {name} could not give batch {number} (counted from 0): {type(error).__name__}: {last_line(error)}. "
            "So the work stopped there. Mend the data, or leave out the samples that cannot be read."
        ) from error


def as_arguments(inputs: Example | list[Any]) -> Inputs:
    """Return the positional and keyword arguments that an example, or a batch without its labels, stands for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, list | tuple) else ((inputs,), {})


def run_on(model: Callable[..., Any], inputs: Any) -> Any:
    """Return a model's outputs for a batch without its labels, of the model's device: all parts of a run call it so."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def batched(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with at least two samples: `torch.export` would make a batch size of 1 a constant.

    They are those given where the first tensor has several: what has a single row then, such as a mask, is for all.
    """
    if next(iter(_first_sizes((args, kwargs))), 0) != 1:
        return args, kwargs

    def double(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == 1 else x

    result: tuple[Any, Any] = pytree.tree_map(double, (args, kwargs))
    return result


def sample_count(arguments: Any) -> int:
    """Return the number of samples in a call's arguments: that of the first tensor; where it has 1, the largest.

    A tensor with another number of rows, such as the queries of a detector, is no batch.
    """
    sizes = _first_sizes(arguments)
    return sizes[0] if sizes and sizes[0] > 1 else max(sizes, default=0)


def _first_sizes(arguments: Any) -> list[int]:
    return [len(x) for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.ndim]


def own_tensors(model: nn.Module, inputs: Any) -> Any:
    """Return the arguments with tensors of their own, on the model's device.

    Of one tensor that is given twice, `torch.export` would make one input.
    """
    device = next((p.device for p in model.parameters()), None)
    return pytree.tree_map_only(Tensor, lambda x: x.detach().to(device, copy=True), inputs)


def input_form(model: nn.Module, inputs: Inputs, entries: tuple[str, ...] = ()) -> InputForm:
    """Return how a model takes inputs like those of an example; `entries` is the field of `InputForm`."""
    args, kwargs = inputs
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    converted = None if dtype == torch.float32 else dtype
    return InputForm(args, kwargs, argument_names(model, len(args)), converted, entries)


def argument_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of the first positional arguments that a model's forward takes."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]
    return tuple((found + [f"input {i}" for i in range(len(found), count)])[:count])


def inputs_of(batch: Any, form: InputForm, number: int = 0) -> Inputs:
    """Return the arguments of a batch, in the order of the example.

    Args:
        batch: a tensor; a sequence of as many inputs as the example has, then anything; a sequence whose first item is
            a sequence or dict of all inputs; or a dict, whose keys that name no input are ignored. A dataclass is taken
            for the dict of its fields, and so is a named tuple that has a field for each input.
        form: how the model takes its inputs.
        number: the batch's place in the loader, for messages.

    Raises:
        CalibrationError: an input is missing, no tensor, empty, or of another type or number of axes than the
            example's; the message names the batch and the input.
    """
    batch = [batch] if _is_first_argument(batch, form) else by_name(batch, form.tensor_names)
    if isinstance(batch, Mapping):
        args, kwargs = _inputs_of_mapping(batch, form, number)
    elif is_sequence(batch) and batch and _is_nested(batch[0], form):
        return inputs_of(batch[0], form, number)
    else:
        args, kwargs = _inputs_of_sequence(list(batch) if is_sequence(batch) else [batch], form, number)
    args = tuple(in_order_of(value, like) for value, like in zip(args, form.args, strict=True))
    kwargs = {name: in_order_of(value, form.kwargs[name]) for name, value in kwargs.items()}
    for name, value, like in zip(form.names, args, form.args, strict=True):
        _check_input(name, value, like, form.converted, number)
    for name, value in kwargs.items():
        _check_input(name, value, form.kwargs[name], form.converted, number)
    return args, kwargs


def label_of(batch: Any, form: InputForm) -> Any:
    """Return the label of a batch: the entry behind the inputs, or the one that a dict calls so; None without any.

    Its key is one of `LABEL_KEYS`, or else contains one of the words, as "label_ids" does.
    """
    named = by_name(batch, form.tensor_names)
    if isinstance(named, Mapping):
        spare = spare_entries(batch, form)
        labels = [key for key in LABEL_KEYS if key in spare]
        labels = labels or [key for key in spare if "label" in str(key) or "target" in str(key)]
        # A named tuple may give its label any name: it is then the first field that is no input.
        labels = labels or (spare if is_sequence(batch) else [])
        return named[labels[0]] if labels else None
    if not is_sequence(batch) or not batch:
        return None
    nested = _is_nested(batch[0], form)
    if nested and len(batch) == 1:
        return label_of(batch[0], form)
    if form.entries and not nested:
        spare = [entry for name, entry in zip(form.entries, batch, strict=False) if name not in form.kwargs]
        if labels := [entry for entry in spare if entry is not None]:
            return labels[0]
    # A sequence gives the inputs one by one, or all of them in its first item.
    taken = 1 if nested else len(form.entries) or (_leading_entries(list(batch), form)[1] if form.args else 1)
    return batch[taken] if len(batch) > taken else None


def spare_entries(batch: Any, form: InputForm) -> list[Any]:
    """Return the keys of a dict's entries that are no inputs of the model; [] for a batch without names."""
    named = by_name(batch, form.tensor_names)
    return [key for key in named if key not in (*form.kwargs, *form.names)] if isinstance(named, Mapping) else []


def is_label(parameter: inspect.Parameter) -> bool:
    """Return True for a parameter of a forward that takes labels for a loss, and may be left out.

    The names are those of the models of transformers: they hold "label", or are those of its questions and answers.
    """
    named = "label" in parameter.name or parameter.name in LABEL_NAMES
    return named and parameter.default is None


def in_order_of(value: Any, like: Any) -> Any:
    """Return an input with the entries of its dicts in the order of the example's: files take tensors in that order."""
    if type(value) in (dict, OrderedDict) and isinstance(like, Mapping) and value.keys() == like.keys():
        return type(value)((key, in_order_of(value[key], like[key])) for key in like)
    if type(value) in (list, tuple) and is_sequence(like) and len(value) == len(like):
        return type(value)(in_order_of(one, other) for one, other in zip(value, like, strict=True))
    return value


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return all tensors of a model's arguments, in their order."""
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def is_sequence(value: Any) -> bool:
    """Return True for a list, a tuple or the like, and not for a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_first_argument(value: Any, form: InputForm) -> bool:
    """Return True for a dataclass that the model takes as it is."""
    return bool(form.args) and dataclasses.is_dataclass(value) and type(value) is type(form.args[0])


def _is_nested(first: Any, form: InputForm) -> bool:
    """Return True if the first item of a batch holds all inputs."""
    if _is_first_argument(first, form):
        return False
    like = form.args[0] if form.args else form.kwargs.get(form.entries[0]) if form.entries else None
    if isinstance(by_name(first, form.tensor_names), Mapping):
        return not isinstance(like, Mapping)
    return is_sequence(first) and not is_sequence(like)


def _inputs_of_mapping(batch: Mapping[str, Any], form: InputForm, number: int) -> Inputs:
    examples = {**dict(zip(form.names, form.args, strict=True)), **form.kwargs}
    missing = [name for name, like in examples.items() if name not in batch and _holds_tensors(like)]
    if missing:
        raise _mismatch_error(
            number,
            f"has no {' and no '.join(missing)} (its keys: {', '.join(map(str, batch)) or 'none'})",
            f"Give a dict with {form.expected}, or prepare the model with an example like the batch.",
        )
    # An input without tensors, such as a switch, may be missing: it is then that of the example.
    values = {name: batch.get(name, like) for name, like in examples.items()}
    return tuple(values[name] for name in form.names), {name: values[name] for name in form.kwargs}


def _inputs_of_sequence(entries: list[Any], form: InputForm, number: int) -> Inputs:
    if form.entries:
        return _inputs_between_labels(entries, form, number)
    if form.kwargs:
        return _inputs_for_keyword(entries, form, number)
    args, _ = _leading_entries(entries, form)
    if len(args) < len(form.args):
        raise _mismatch_error(
            number,
            f"holds {len(entries)} of the model's {form.expected}",
            "Let the loader give as many inputs as the example has, and the label after them; or prepare the model "
            "with an example like the batch.",
        )
    return args, {}


def _leading_entries(entries: list[Any], form: InputForm) -> tuple[tuple[Any, ...], int]:
    """Return the positional arguments that the first entries of a batch give, and the number of these entries.

    A switch of the example, such as True, may be missing in the batch, where a label then takes its place. The
    arguments end before a tensor that is missing.
    """
    args: list[Any] = []
    taken = 0
    for like in form.args:
        entry = entries[taken] if taken < len(entries) else None
        is_missing = taken == len(entries) or (like is not None and isinstance(entry, Tensor))
        if is_missing and not _holds_tensors(like):
            args.append(like)
        elif taken == len(entries):
            break
        else:
            args.append(entry)
            taken += 1
    return tuple(args), taken


def _inputs_between_labels(entries: list[Any], form: InputForm, number: int) -> Inputs:
    """Return the arguments of a batch that is like an example with labels between its inputs."""
    given = dict(zip(form.entries, entries, strict=False))
    if any(name not in given and _holds_tensors(like) for name, like in form.kwargs.items()):
        raise _mismatch_error(
            number,
            f"holds {len(entries)} of the example's {len(form.entries)} entries ({', '.join(form.entries)})",
            "Let the loader give all of them in this order, with None for labels that are left out; or give dicts with "
            f"{form.expected}.",
        )
    return (), {name: given.get(name, like) for name, like in form.kwargs.items()}


def _inputs_for_keyword(entries: list[Any], form: InputForm, number: int) -> Inputs:
    """Return the argument of a model that was prepared with a dict, for a batch that names nothing."""
    tensors = [name for name, like in form.kwargs.items() if _holds_tensors(like)]
    if len(tensors) != 1 or not entries:
        raise _mismatch_error(
            number,
            "names no inputs, and the model was prepared with a dict",
            f"So it is not known which entry is which. Give dicts with {form.expected}, or prepare the model with a "
            "tuple.",
        )
    return (), {**form.kwargs, tensors[0]: entries[0]}


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _check_input(name: str, value: Any, like: Any, converted: torch.dtype | None, number: int) -> None:
    """Raise CalibrationError for an input that is unlike the example's."""
    if not isinstance(like, Tensor):
        return
    what = f'has "{name}" as '
    if value is None:
        raise _mismatch_error(
            number, f"{what}None", f"{_example_sentence(like)} Give a tensor, or leave the batch out."
        )
    if not isinstance(value, Tensor):
        remedy = "Make it a tensor, for example with torch.as_tensor(...)."
        kind = "a numpy array" if type(value).__module__ == "numpy" else f"a {type(value).__name__}"
        raise _mismatch_error(number, what + kind, f"{_example_sentence(like)} {remedy}")
    if value.ndim != like.ndim:
        remedy = "Give the axes that the example has, the samples first."
        if value.ndim == like.ndim - 1:
            remedy = f"{remedy} For single samples, {MAKE_BATCHES}."
        raise _mismatch_error(
            number, f"{what}a tensor of shape {list(value.shape)}", f"{_example_sentence(like)} {remedy}"
        )
    if value.numel() == 0:
        remedy = "Leave out empty batches, for example with drop_last=True."
        raise _mismatch_error(number, f"{what}an empty tensor of shape {list(value.shape)}", remedy)
    # A model that was converted, to bfloat16 for example, takes floating inputs of its own type.
    expected = converted if converted and like.is_floating_point() else like.dtype
    if value.dtype != expected:
        told = f"The model was converted to {converted}." if expected != like.dtype else _example_sentence(like)
        raise _mismatch_error(number, f"{what}a tensor of {value.dtype}", f"{told} Convert it with .to({expected}).")


def _example_sentence(like: Tensor) -> str:
    sizes = ", ".join(["*", *map(str, like.shape[1:])]) if like.ndim else ""  # of a batch, two samples are kept
    return f"The example that the model was prepared with has shape [{sizes}] and {like.dtype} there."


def _mismatch_error(number: int, what: str, remedy: str) -> CalibrationError:
    return CalibrationError(f"Batch {number} (counted from 0) {what}, so the model cannot be run on it. {remedy}")
