"""Recurrent layers while a model is traced: one operator for sequences of any length.

`torch.export` runs LSTM, GRU and RNN step by step on tensors without data, which makes the number of steps a constant.
Within `WholeRecurrences` they are traced as an operator of halfeven's own that knows its results' sizes; afterwards
`restore_recurrences` puts torch's operators back.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from halfeven.errors import CaptureError, ExportError
from halfeven.graph.model_inputs import constant_size

aten = torch.ops.aten

CELLS: dict[str, Any] = {
    "lstm": aten.lstm.input,
    "gru": aten.gru.input,
    "rnn_tanh": aten.rnn_tanh.input,
    "rnn_relu": aten.rnn_relu.input,
}
"""Recurrent layers of padded sequences, by the names of torch's functions."""

ARGUMENTS = 9

PACKED = (
    "The sizes in a packed sequence (pack_padded_sequence) depend on the values of the lengths, so there is no graph "
    "of it, and no file. Run the recurrent layer on the padded batch, and read its outputs at the last steps by "
    "gather. In a bidirectional layer, whose way back then begins at the padding, that needs training."
)
"""Why a model with packed sequences cannot be captured whole, and what to do."""


@torch.library.custom_op("halfeven::cells", mutates_args=())
def cells(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Return the outputs of recurrent layers and their last states; all arguments but two are those of torch's.

    Args:
        kind: a name in `CELLS`.
        states: the first states: two of an LSTM, one of other cells.
    """
    first: Any = states if kind == "lstm" else states[0]
    common = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return [result.clone() for result in CELLS[kind](x, first, weights, *common)]


@cells.register_fake
def _(kind: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *common: Any) -> list[Tensor]:
    directions = 1 + common[4]
    return [x.new_empty((*x.shape[:-1], directions * states[0].shape[-1])), *(torch.empty_like(s) for s in states)]


class WholeRecurrences(TorchFunctionMode):
    """Replaces torch's functions for recurrent layers by `halfeven::cells`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kind = next((name for name, cell in CELLS.items() if func is cell), getattr(func, "__name__", ""))
        if kind == "_pack_padded_sequence":
            raise CaptureError(PACKED)
        # Of packed sequences, whose functions have the same names, the fourth argument is a list.
        if kind in CELLS and len(args) == ARGUMENTS and isinstance(args[3], bool):
            x, states, weights, *common = args
            first = list(states) if isinstance(states, list | tuple) else [states]
            return tuple(torch.ops.halfeven.cells(kind, x, first, list(weights), *common))
        return func(*args, **(kwargs or {}))


def refuse_packed_sequences(arguments: Iterable[Any]) -> None:
    """Refuse packed sequences among the arguments of a module.

    Raises:
        CaptureError: there is one.
    """
    if any(isinstance(argument, nn.utils.rnn.PackedSequence) for argument in arguments):
        raise CaptureError(PACKED)


def restore_recurrences(graph: fx.Graph) -> None:
    """Replace the calls of `halfeven::cells` in a graph by torch's operators, in place."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.halfeven.cells.default):
        kind, x, states, *more = node.args
        node.target = CELLS[str(kind)]
        node.args = (x, states if kind == "lstm" else states[0], *more)


def has_projection(node: fx.Node) -> bool:
    """Return True for an LSTM whose outputs are projected (`proj_size`)."""
    given: Any = node.args
    # Each layer has two weights for each direction, and two biases where it has any; a projection would be a weight
    # more.
    directions = 2 if given[7] else 1
    return bool(len(given[2]) != given[4] * directions * (4 if given[3] else 2))


def has_free_steps(node: fx.Node) -> bool:
    """Return True for recurrent layers that read a sequence of any length."""
    given: Any = node.args
    return constant_size(given[0].meta["val"].shape[1 if given[8] else 0]) is None


def refuse_recurrence(node: fx.Node, runtime: str) -> None:
    """Refuse recurrent layers that a runtime's file has no operator for.

    Raises:
        ExportError: always.
    """
    kind = "an LSTM with projections (proj_size)" if has_projection(node) else "an RNN whose number of steps is free"
    raise ExportError(
        f"{runtime} has no operator for {kind} ({node.name}), so the file would not compute what the model does. Use "
        "an LSTM or a GRU without projections, or deploy the parts before and behind it."
    )
