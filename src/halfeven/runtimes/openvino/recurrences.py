"""Recurrent layers as one sequence operator for each, which the plugin computes in one kernel.

The front end takes a recurrent layer of an exported program apart, step by step: a hundred operators for ten steps, and
a file for one length alone.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from halfeven.graph.recurrences import has_free_steps, has_projection, refuse_recurrence

aten = torch.ops.aten

CELLS: dict[Any, str] = {
    aten.gru.input: "gru",
    aten.lstm.input: "lstm",
    aten.rnn_tanh.input: "tanh",
    aten.rnn_relu.input: "relu",
}
"""Recurrent layers of padded sequences, and the cell of each."""

CELL_NAMES = tuple(CELLS.values())

GATE_ORDER = {"gru": (1, 0, 2), "lstm": (1, 0, 2, 3), "tanh": (0,), "relu": (0,)}
"""The places of OpenVINO's gates among PyTorch's: update, reset, new of a GRU; forget, input, cell, output of an
LSTM."""


STEPS_AND_SAMPLES = np.array([1, 0, 2])
"""Order of axes that exchanges the first two."""


@torch.library.custom_op("halfeven::recurrence", mutates_args=())
def recurrence(
    kind: int,
    biased: bool,
    directions: int,
    batch_first: bool,
    returns_cell: bool,
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    w_ih_reverse: Tensor,
    w_hh_reverse: Tensor,
    b_ih_reverse: Tensor,
    b_hh_reverse: Tensor,
) -> Tensor:
    """Return one recurrent layer's output, or the last state of its cells. The front end reads no lists of tensors.

    Args:
        kind: a place in `CELL_NAMES`.
        biased: each direction has two biases after its two weights; else anything stands there.
        directions: 1 or 2; anything stands for the weights of a second that there is not.
        batch_first: x is [samples, steps, features], and the output alike; else [steps, samples, features].
        returns_cell: return the last state of an LSTM's cells, [directions, samples, features].
        x: the sequence.
        hidden: the first state, [directions, samples, features].
        cell: that of an LSTM's cells; of other cells anything.
        w_ih, w_hh, b_ih, b_hh: as in `torch.nn.LSTM`.
        w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse: those of the second direction.
    """
    both = ((w_ih, w_hh, b_ih, b_hh), (w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse))
    weights = [weight for own in both[:directions] for weight in own[: 4 if biased else 2]]
    # A single layer, without dropout, in eval mode.
    common = (weights, biased, 1, 0.0, False, directions == 2, batch_first)
    states: Any = [hidden, cell] if CELL_NAMES[kind] == "lstm" else hidden
    layer: Any = next(target for target, name in CELLS.items() if name == CELL_NAMES[kind])
    result: Tensor = layer(x, states, *common)[2 if returns_cell else 0]
    return result.clone()


@recurrence.register_fake
def _(
    kind: int,
    biased: bool,
    directions: int,
    batch_first: bool,
    returns_cell: bool,
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    *weights: Tensor,
) -> Tensor:
    if returns_cell:
        return torch.empty_like(cell)
    return x.new_empty((*x.shape[:2], directions * hidden.shape[-1]))


def keep_recurrences_whole(program: torch.export.ExportedProgram) -> None:
    """Write each recurrent layer of a program as calls of `halfeven::recurrence`, in place.

    A layer with projections, for which the plugin has no operator, is left to the front end, step by step.

    Raises:
        ExportError: such a layer has a free number of steps.
    """
    for node in list(program.graph.nodes):
        if node.target not in CELLS:
            continue
        if has_projection(node):
            if has_free_steps(node):
                refuse_recurrence(node, "OpenVINO")
        elif all(r.target is operator.getitem for r in node.users):
            _write_layers(program.graph, node)


def _write_layers(graph: fx.Graph, node: fx.Node) -> None:
    """Write the layers of an operator, each of which reads the output of the layer before, and their last states."""
    given: Any = node.args
    sequence, first_states, weights, biased, layers, _, _, bidirectional, batch_first = given
    kind = CELL_NAMES.index(CELLS[node.target])
    is_lstm = CELL_NAMES[kind] == "lstm"
    # An LSTM has two states, hidden and cell; for other cells the hidden state stands in both places.
    states: Any = first_states if is_lstm else [first_states, first_states]
    directions = 2 if bidirectional else 1
    size = int(states[0].meta["val"].shape[-1])
    # The operator's results: 0 is the sequence, 1 the last hidden states, 2 the last cell states.
    read = {reader.args[1] for reader in node.users if reader.users}
    with graph.inserting_before(node):
        last: list[list[fx.Node]] = [[], []]
        count = len(weights) // layers
        for layer in range(layers):
            # PyTorch lists the weights of a layer before those of the next: for each direction w_ih, w_hh and, with
            # biases, b_ih and b_hh.
            own = _at_their_places(weights[layer * count : (layer + 1) * count], biased, sequence)
            hidden, cell = (_state_of_layer(graph, state, layer, directions) for state in states)
            values = (sequence, hidden, cell, *own)
            call = (kind, biased, directions, batch_first)
            sequence = graph.call_function(torch.ops.halfeven.recurrence.default, (*call, False, *values))
            if 1 in read:
                last[0].append(_last_hidden(graph, sequence, directions, batch_first, size))
            if 2 in read:
                # The last state of the cells is no part of the output: a second call of the same layer returns it.
                last[1].append(graph.call_function(torch.ops.halfeven.recurrence.default, (*call, True, *values)))
        results = [sequence, *(graph.call_function(aten.cat.default, (found, 0)) if found else None for found in last)]
    for reader in list(node.users):
        place: Any = reader.args[1]
        if reader.users:
            reader.replace_all_uses_with(results[place])
        graph.erase_node(reader)
    graph.erase_node(node)


def _at_their_places(weights: Sequence[fx.Node], biased: bool, anything: fx.Node) -> list[fx.Node]:
    """Return a layer's weights at their places among the eight of two directions with biases."""
    count = 4 if biased else 2
    places = [anything] * 8
    for number, weight in enumerate(weights):
        places[4 * (number // count) + number % count] = weight
    return places


def _state_of_layer(graph: fx.Graph, state: fx.Node, layer: int, directions: int) -> fx.Node:
    """Return the first state of one layer, [directions, samples, features]."""
    start = layer * directions
    return graph.call_function(aten.slice.Tensor, (state, 0, start, start + directions))


def _last_hidden(graph: fx.Graph, output: fx.Node, directions: int, batch_first: bool, size: int) -> fx.Node:
    """Return the last hidden state of each direction, which is a part of the output: [directions, samples, features].

    The second direction ends at the first step.
    """
    ends = []
    for direction in range(directions):
        step = graph.call_function(aten.select.int, (output, 1 if batch_first else 0, -1 if direction == 0 else 0))
        start = direction * size
        own = graph.call_function(aten.slice.Tensor, (step, 1, start, start + size))
        ends.append(graph.call_function(aten.unsqueeze.default, (own, 0)))
    return graph.call_function(aten.cat.default, (ends, 0))


def translation() -> Callable[[Any], list[Any]]:
    """Return a function that translates the calls of `halfeven::recurrence` of one program.

    The two calls that return a layer's output and the last state of its cells get one operator.
    """
    made: dict[tuple[Any, ...], Any] = {}

    def translate(context: Any) -> list[Any]:
        kind, biased, directions, batch_first, returns_cell = (
            int(_constant_value(context.get_input(i))) for i in range(5)
        )
        values = [context.get_input(i) for i in range(5, 8)]
        count = 4 if biased else 2
        weights = [[context.get_input(8 + 4 * d + i) for i in range(count)] for d in range(directions)]
        read = (*values, *(weight for own in weights for weight in own))
        key = (kind, *((value.get_node().get_name(), value.get_index()) for value in read))
        if key not in made:
            made[key] = _sequence_operator(CELL_NAMES[kind], values, weights, batch_first=bool(batch_first))
        return [_last_cell(made[key]) if returns_cell else _layer_output(made[key], batch_first=bool(batch_first))]

    return translate


def _sequence_operator(name: str, values: Sequence[Any], weights: list[list[Any]], *, batch_first: bool) -> Any:
    """Return a sequence operator of OpenVINO.

    Args:
        name: the cell.
        values: the sequence, the first hidden state and that of the cells.
        weights: those of each direction.
        batch_first: the sequence is [samples, steps, features].
    """
    from openvino import opset13 as opset

    x, hidden, cell = values
    directions = len(weights)
    x = x if batch_first else opset.transpose(x, STEPS_AND_SAMPLES).output(0)
    # OpenVINO's states are [samples, directions, features].
    hidden, cell = (opset.transpose(state, STEPS_AND_SAMPLES).output(0) for state in (hidden, cell))
    shape = opset.shape_of(x, "i64")
    samples, steps = (opset.gather(shape, np.array([axis]), np.int64(0)) for axis in (0, 1))
    # Every sample has all steps.
    lengths = opset.broadcast(steps, samples)
    matrices = [opset.concat([_reordered_gates(own[place], name) for own in weights], 0) for place in (0, 1)]
    size = int(weights[0][1].get_partial_shape()[1].get_length())
    bias = opset.concat([_sequence_bias(own[2:], name, size) for own in weights], 0)
    common = (lengths, *matrices, bias, size, "bidirectional" if directions == 2 else "forward")
    if name == "lstm":
        return opset.lstm_sequence(x, hidden, cell, *common)
    if name == "gru":
        return opset.gru_sequence(x, hidden, *common, linear_before_reset=True)
    return opset.rnn_sequence(x, hidden, *common, activations=[name])


def _last_cell(sequence: Any) -> Any:
    """Return the last state of the cells of an LSTM, [directions, samples, features]."""
    from openvino import opset13 as opset

    return opset.transpose(sequence.output(2), STEPS_AND_SAMPLES).output(0)


def _layer_output(sequence: Any, *, batch_first: bool) -> Any:
    """Return the output of all directions as the layer of PyTorch has it."""
    from openvino import opset13 as opset

    # [samples, directions, steps, features] -> [samples, steps, directions * features]
    by_step = opset.transpose(sequence.output(0), np.array([0, 2, 1, 3]))
    output = opset.reshape(by_step, np.array([0, 0, -1]), True)
    return (output if batch_first else opset.transpose(output, STEPS_AND_SAMPLES)).output(0)


def _reordered_gates(weight: Any, name: str) -> Any:
    """Return a matrix [gates * features, inputs], or a bias, with its gates in OpenVINO's order and an axis before."""
    from openvino import opset13 as opset

    order = GATE_ORDER[name]
    parts = opset.split(weight, np.int64(0), len(order))
    return opset.unsqueeze(opset.concat([parts.output(place) for place in order], 0), np.int64(0))


def _sequence_bias(biases: Sequence[Any], name: str, size: int) -> Any:
    """Return the biases of one direction, [1, gates * features]; a GRU's new gate has both of its own."""
    from openvino import opset13 as opset

    gates = len(GATE_ORDER[name])
    if not biases:
        return opset.constant(np.zeros((1, (gates + (name == "gru")) * size), np.float32))
    own, recurrent = (_reordered_gates(bias, name) for bias in biases)
    both = opset.add(own, recurrent)
    if name != "gru":
        return both
    # With linear_before_reset, as in PyTorch, the reset gate multiplies the recurrent bias of the new gate: it cannot
    # be added to the other.
    summed = opset.split(both, np.int64(1), gates)
    kept = [opset.split(bias, np.int64(1), gates).output(gates - 1) for bias in (own, recurrent)]
    return opset.concat([summed.output(0), summed.output(1), *kept], 1)


def _constant_value(output: Any) -> np.ndarray[Any, Any]:
    return np.asarray(output.get_node().get_data())
