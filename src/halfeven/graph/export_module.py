"""Export a module by `torch.export`, as a graph whose layers are modules again."""

import inspect
import io
import keyword
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from halfeven.errors import CaptureError, named
from halfeven.graph.batches import Inputs
from halfeven.graph.constant_inputs import constant_inputs
from halfeven.graph.dynamic_shapes import FreeAxes, export_shapes, nested_shapes
from halfeven.graph.fixed_axes import is_batch_fixed, reason_of_fixed_batch, refuse_fixed_axes
from halfeven.graph.functionalize import allow_copies
from halfeven.graph.inline import inline_grad_blocks
from halfeven.graph.kept_in_python import Calls, kept_markers
from halfeven.graph.model_inputs import model_inputs, region_inputs
from halfeven.graph.rebuild import CapturedModule, assemble
from halfeven.graph.recurrences import WholeRecurrences, refuse_packed_sequences, restore_recurrences
from halfeven.graph.restoring import attributes_restored
from halfeven.graph.size_relations import size_relations
from halfeven.graph.sized_pools import SizedPools
from halfeven.graph.stochastic_depth import leaf_markers
from halfeven.graph.torch_private import has_layout_guards, untracked
from halfeven.graph.training_outputs import (
    TrainingOutputs,
    TrainingOutputsError,
    own_flags_on,
    tap_training_outputs,
)
from halfeven.graph.training_run import left_in_eval


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings, log lines and graphs that `torch.export` prints; its errors are raised as usual."""
    chatty = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = chatty.level
    chatty.setLevel(logging.CRITICAL)
    try:
        # It prints what it has of a graph to stderr where the code asks for values.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.setLevel(level)


def export_module(
    module: nn.Module,
    inputs: Inputs,
    free: FreeAxes,
    name: str = "",
    kept: Sequence[str] = (),
    returning_others: Sequence[str] = (),
) -> CapturedModule:
    """Export a module, and put its layers back under their own names.

    Args:
        module: the module.
        inputs: its arguments.
        free: the free axes of each leaf of the arguments.
        name: its name in the model that it is a part of; "" for the model itself.
        kept: paths of the modules in it that are kept in Python.
        returning_others: paths of the modules in it whose other outputs in training the graph shall return.

    Raises:
        FixedAxisError: the module's code makes an axis that the user frees a constant.
        TrainingOutputsError: the outputs of training cannot be made of tensors of eval mode.
        CaptureError: an argument is a packed sequence.
    """
    refuse_packed_sequences((*inputs[0], *inputs[1].values()))
    described = model_inputs(module, inputs, free)
    export = partial(export_program, module, inputs, kept)
    try:
        program, unlifted, calls = export(export_shapes(free))
    except Exception as error:
        refuse_fixed_axes(error, described, name, export, free)
        raise
    training = None
    if returning_others:
        training = _training_outputs(module, returning_others, unlifted, partial(export, export_shapes(free)))
    result = assemble(module, unlifted, calls, training)
    result.stays_in_eval = left_in_eval(module)
    result.region_name = name
    result.region_inputs = region_inputs(result.graph, described)
    result.constant_inputs = constant_inputs(module, inputs, result.graph)
    result.size_relations = size_relations(program, result.region_inputs)
    if has_layout_guards(program):
        allow_copies(result)
    if is_batch_fixed(described, result.region_inputs):
        result.fixed_batch = reason_of_fixed_batch(export, free)
    return result


def _training_outputs(
    module: nn.Module, names: Sequence[str], unlifted: fx.GraphModule, export: Callable[[], Any]
) -> TrainingOutputs:
    """Return the outputs of training, made of tensors that are tapped in the graph of eval mode, in place."""
    try:
        with own_flags_on(module, names):
            _, trained, _ = export()
    except Exception as error:  # torch.export raises many kinds
        raise TrainingOutputsError(f"training cannot be traced: {error}") from error
    return tap_training_outputs(module, unlifted, trained)


def reason_of_fixed_batch_between_parts(captured: nn.Module, inputs: Inputs, free: FreeAxes) -> str:
    """Return why code that stays Python makes the batch a constant in a file; "" where it is free, or no file possible.

    Args:
        captured: a model that is captured in parts.
        inputs: its arguments.
        free: the free axes of each leaf of the arguments.
    """
    described = model_inputs(captured, inputs, free)
    export = partial(export_program, captured, inputs, ())
    try:
        _, unlifted, _ = export(export_shapes(free))
    except Exception:  # deployment exports once more, and tells the error
        return ""
    fixed = is_batch_fixed(described, region_inputs(unlifted.graph, described))
    return reason_of_fixed_batch(export, free) if fixed else ""


def export_program(
    module: nn.Module,
    inputs: Inputs,
    kept: Sequence[str],
    shapes: list[Any],
    watching: AbstractContextManager[Any] | None = None,
) -> tuple[torch.export.ExportedProgram, fx.GraphModule, Calls]:
    """Return the program that `torch.export` makes of a module, its graph, and the traced calls of kept modules.

    Args:
        module: the module.
        inputs: its arguments.
        kept: paths of the modules that are kept in Python.
        shapes: what `torch.export` is told of each of their leaves.
        watching: a context for `torch.export` to run in.

    Raises:
        CaptureError: the name of a keyword argument cannot be that of a parameter, or a sequence is packed.
    """
    args, kwargs = inputs
    check_keywords(kwargs)
    given = nested_shapes(inputs, shapes)
    with attributes_restored(module), leaf_markers(module), kept_markers(module, kept) as calls, quiet():
        with SizedPools(), WholeRecurrences(), watching or nullcontext():
            # Not strict: the model's Python code runs, and its operators on tensors are recorded.
            program = torch.export.export(
                module, args, kwargs, dynamic_shapes=_arguments_by_parameter(module, *given), strict=False
            )
        unlifted = program.module()
    assert isinstance(unlifted, fx.GraphModule)
    inline_grad_blocks(unlifted)
    restore_recurrences(unlifted.graph)
    return untracked(program), unlifted, calls


def check_keywords(names: Iterable[str]) -> None:
    """Check that keyword arguments can be parameters: torch.fx writes a graph as a function with these parameters.

    Raises:
        CaptureError: a name is a keyword of Python, or no name in Python, which a forward takes by `**kwargs` alone.
    """
    if wrong := [name for name in names if keyword.iskeyword(name) or not name.isidentifier()]:
        raise CaptureError(
            "A graph is a function with its inputs as parameters, and Python takes no parameter called "
            f"{named(wrong)}, so the model cannot be captured. Rename the input in the model and in the loader, for "
            f'example to "{_as_parameter(wrong[0])}".'
        )


def _as_parameter(name: str) -> str:
    plain = re.sub(r"\W|^(?=\d)", "_", name)
    return f"{plain}_" if keyword.iskeyword(plain) else plain


def _arguments_by_parameter(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
