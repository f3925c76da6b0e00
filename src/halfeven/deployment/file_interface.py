"""The interface of a deployed file: names of its inputs and outputs, names of their free axes, and facts about it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor

from halfeven.errors import ConfigError
from halfeven.graph.batches import Inputs
from halfeven.graph.model_inputs import ModelInput, constant_size, path_names
from halfeven.graph.torch_private import pytree

OUTPUT = "output"
"""Name of a model's only output, and the beginning of the names "output_0", "output_1" of a tuple's tensors."""

FloatPrecision = Literal["f32", "runtime"]
"""Precision of the operators that stay float: float32, or what the runtime computes in by its own choice."""

FLOAT_PRECISION = "float_precision"
"""Name of the fact that says in a file which of them it was written for; a file without it is for float32."""

AXES = "axes"
"""Name of the fact that has the free axes of each input."""


@dataclass(frozen=True)
class FileInterface:
    """Names and facts that a file contains."""

    inputs: tuple[str, ...]
    """Names of the inputs, in their order."""
    outputs: tuple[str, ...]
    """Names of the outputs, in their order."""
    axes: tuple[Mapping[int, str], ...] = ()
    """For each input the names of its free axes, by their numbers."""
    symbols: Mapping[str, str] = field(default_factory=dict)
    """Name of a free axis by the symbol that torch.export gives its size."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Facts by name."""


def interface_of(
    program: torch.export.ExportedProgram,
    described: Inputs,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> FileInterface:
    """Return the interface of a program's file, with the names given, or else those of the model's forward.

    Args:
        program: the program to write.
        described: the model's inputs, as `recorded_inputs` returns them.
        input_names: names for the inputs, in their order.
        output_names: names for the outputs, in their order.
        metadata: facts to write into the file.

    Raises:
        ConfigError: names that are too many, too few or equal.
    """
    args, kwargs = described
    order = _keyword_order(program)
    # In the program's order, which is that of the file's inputs.
    leaves = pytree.tree_leaves((args, {name: kwargs[name] for name in order}))
    known = [leaf for leaf in leaves if isinstance(leaf, ModelInput)]
    inputs = _chosen_names("input", [one.name for one in known], input_names)
    # A dict may name an output like an input; a file's names differ.
    own = [f"{name}_{OUTPUT}" if name in inputs else name for name in _output_names(program)]
    outputs = _chosen_names("output", own, output_names)
    axes = [one.free for one in known]
    if both := set(inputs) & set(outputs):
        raise ConfigError(
            f"{', '.join(sorted(both))} would name an input and an output, and a file's names must differ. Give other "
            "input_names or output_names."
        )
    return FileInterface(
        inputs=inputs,
        outputs=outputs,
        axes=tuple(axes),
        symbols=_axis_symbols(program, known),
        metadata={**(metadata or {}), AXES: json.dumps(dict(zip(inputs, axes, strict=True)))},
    )


def facts_of(
    scheme: str, target: str, precision: FloatPrecision, settings: Sequence[str], more: Mapping[str, str]
) -> dict[str, str]:
    """Return the facts that every file contains: who wrote it, how it is quantized, and how it is to be run.

    Args:
        scheme: bits of weights and activations.
        target: name of the runtime that the file is for.
        precision: precision of what stays float.
        settings: settings that the runtime's session must be given, as `name=value`.
        more: further facts of the user's.

    Raises:
        ConfigError: a further fact has a name of halfeven's own.
    """
    own = {"version": version("halfeven"), "scheme": scheme, "target": target, "settings": ", ".join(settings)}
    own[FLOAT_PRECISION] = precision
    if taken := sorted({*own, AXES} & set(more)):
        raise ConfigError(
            f"metadata has {', '.join(taken)}, which halfeven writes itself, so the file would not say how it is to be "
            "run. Give these facts other names."
        )
    return {**own, **more}


def input_values(program: torch.export.ExportedProgram) -> list[Tensor]:
    """Return the recorded tensors of a program's inputs, in their order; the size of a free axis is a symbol."""
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [value for value in values if isinstance(value, Tensor)]


def _keyword_order(program: torch.export.ExportedProgram) -> list[str]:
    form = program.call_spec.in_spec
    assert form is not None
    # The form is that of (positional, keyword) arguments: the second part has the names in the program's order.
    places = pytree.tree_unflatten(list(range(form.num_leaves)), form)
    return list(places[1])


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    form = program.call_spec.out_spec
    assert form is not None
    tree = pytree.tree_unflatten(list(range(form.num_leaves)), form)
    # Buffers that the program changes come first, the model's own outputs last. Outputs that are constants, not
    # tensors, have a value.
    constants = [spec.arg for spec in program.graph_signature.output_specs]
    kept = [hasattr(arg, "name") and not hasattr(arg, "value") for arg in constants[-form.num_leaves :]]
    return [name for name, tensor in zip(path_names(tree, OUTPUT), kept, strict=True) if tensor]


def _chosen_names(what: str, own: Sequence[str], given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return tuple(own)
    if len(given) != len(own) or len(set(given)) != len(given):
        raise ConfigError(
            f"{what}_names={list(given)} does not name the model's {len(own)} {what}s, which are {', '.join(own)}, so "
            "the file was not written. Give a different name for each, in this order."
        )
    return tuple(given)


def _axis_symbols(program: torch.export.ExportedProgram, known: Sequence[ModelInput]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one, value in zip(known, input_values(program), strict=True):
        for axis, name in one.free.items():
            if constant_size(value.shape[axis]) is None:
                found[str(value.shape[axis])] = name
    return found
