"""Axes whose size a model's code makes a constant: how torch.export says so, and what the user is told."""

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch

from halfeven.errors import CaptureError
from halfeven.graph.batches import Inputs
from halfeven.graph.dynamic_shapes import FreeAxes
from halfeven.graph.model_inputs import BATCH, ModelInput
from halfeven.graph.torch_private import pytree


class FixedAxisError(CaptureError):
    """The model's code makes the size of an axis a constant that the user wants free."""


Export = Callable[[list[Any], AbstractContextManager[Any]], Any]
"""Exports a module, told of each leaf's axes, within a context."""

SIZE_PATTERN = r"L\['(\w+)'\]((?:\[[^\]]*\])*)\.size\(\)\[(\d+)\]"
"""Pattern of the size of an input's axis in messages of torch.export: L['images'][0].size()[2]."""
FIXED_PATTERN = re.compile(
    rf"You marked {SIZE_PATTERN} as dynamic but your code specialized it to be a constant \((\d+)\)"
)
NOT_THE_MODEL = ("/torch/", "/halfeven/graph/", "/sympy/", "/logging/", "/contextlib.py", "/functools.py")
"""Parts of the names of files that are between the model's code and the logger, on the stack."""
LOGGER = "torch.fx.experimental.symbolic_shapes"


def leaf_and_axis(found: Sequence[str]) -> tuple[str, int]:
    """Return the name of an input and the axis, from the groups of `SIZE_PATTERN`."""
    parameter, keys, axis = found[:3]
    return "_".join([parameter, *re.findall(r"\w+", keys)]), int(axis)


def fixed_axes(error: Exception, described: Any) -> list[str]:
    """Return words for each free axis that an error of torch.export is about: 'axis 2 of "x" (height) is always 16'.

    Args:
        error: what torch.export raised.
        described: the inputs of the exported module.
    """
    labels = {known.name: known.free for known in pytree.tree_leaves(described) if known is not None}
    words = []
    for found in FIXED_PATTERN.findall(str(error)):
        name, axis = leaf_and_axis(found)
        label = labels.get(name, {}).get(axis, "")
        words.append(f'axis {axis} of "{name}"{f" ({label})" if label else ""} is always {found[3]}')
    return words


def refuse_fixed_axes(error: Exception, described: Inputs, name: str, export: Export, free: FreeAxes) -> None:
    """Raise FixedAxisError where an error of torch.export is about a free axis; do nothing for any other error.

    Args:
        error: what torch.export raised.
        described: the inputs of the exported module.
        name: path of the module; "" for the whole model.
        export: exports the module once more.
        free: the free axes of its inputs.
    """
    if not (fixed := fixed_axes(error, described)):
        return
    part = f"the submodule {name}" if name else "the model"
    raise FixedAxisError(
        f"dynamic_shapes frees an axis whose size the code of {part} makes a constant: {'; '.join(fixed)}"
        f"{_code_places(export, free)}. So the captured graph would be wrong at other sizes. Take sizes from x.shape "
        "there, without int() or a loop over the axis; free the axis for all inputs that are combined; or leave the "
        "axis out of dynamic_shapes."
    ) from error


def reason_of_fixed_batch(export: Export, free: FreeAxes) -> str:
    """Return why the batch is a constant, with the line of code that fixes it.

    Args:
        export: exports the module once more.
        free: the axes that were to stay free.
    """
    return f"the model's code makes it a constant{_code_places(export, free)}"


def is_batch_fixed(described: Inputs, captured: Sequence[ModelInput | None]) -> bool:
    """Return True where the batch was to stay free, and torch.export has made it a constant.

    Args:
        described: the inputs of the exported module.
        captured: the inputs of the captured graph.
    """
    asked = {known.name: known for known in pytree.tree_leaves(described) if known is not None}
    return any(
        wanted == BATCH and isinstance(size, int)
        for known in captured
        if known is not None
        for wanted, size in zip(asked[known.name].sizes, known.sizes, strict=True)
    )


def _code_places(export: Export, free: FreeAxes) -> str:
    """Return the lines of code at which torch.export makes sizes constants, as " (file:line: `code`)"; else ""."""
    dynamic = torch.export.Dim.DYNAMIC
    lines: list[str] = []
    with suppress(Exception):  # the error that is being explained
        export([{axis: dynamic for axis in axes} or None for axes in free], _recording_lines(lines))
    return f" ({'; '.join(dict.fromkeys(lines))})" if lines else ""


@contextmanager
def _recording_lines(lines: list[str]) -> Iterator[None]:
    """Add the model's line to a list whenever torch.export makes a size a constant.

    Its message does not tell the line, but it logs each constant while the model's own code runs.
    """
    logger = logging.getLogger(LOGGER)
    handler = _Listener(lines)
    level = logger.level
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Listener(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args
        if not str(record.msg).startswith("set_replacement") or not isinstance(arguments, tuple):
            return
        # The arguments are a symbol and what replaces it: a number where it becomes a constant.
        frames = traceback.extract_stack()
        # Frames before torch.export's are those of whoever prepares the model.
        start = max((i for i, frame in enumerate(frames) if "/torch/export/" in frame.filename), default=0)
        # The model's own line is the innermost behind torch.export that is neither torch's nor halfeven's.
        own = [frame for frame in frames[start:] if not any(part in frame.filename for part in NOT_THE_MODEL)]
        if str(arguments[1]).isdigit() and own:
            self.lines.append(f"{own[-1].filename}:{own[-1].lineno}: `{(own[-1].line or '').strip()}`")
