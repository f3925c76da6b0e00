"""The tables of a plan: a summary for people, and the whole of it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from halfeven.placement.options import QuantizationOptions
from halfeven.placement.planned import GraphChanges, LeftInFloat, PlannedTensor, PlannedWeight
from halfeven.quantization.scheme import Scheme
from halfeven.tables import as_text, counted, table

T = TypeVar("T")

REST = "print(plan.table())"
"""The call that shows all that a summary leaves out; the command line names a file in its place."""

SUMMARY_LINES = 25
"""Largest number of lines of a summary."""
FEW_LAYERS = 2
"""Blocks of no more layers are not divided further."""


@dataclass(frozen=True)
class Rows:
    """The largest number of rows of each part of a summary."""

    kinds: int
    blocks: int
    reasons: int
    notes: int


SUMMARY_SIZES = (
    Rows(5, 12, 8, 3),
    *(Rows(5, blocks, 4, 3) for blocks in range(12, 5, -1)),
    *(Rows(3, blocks, 3, 2) for blocks in range(12, 3, -1)),
    *(Rows(2, blocks, 2, 1) for blocks in range(6, 0, -1)),
    Rows(2, 1, 1, 0),
)
"""Sizes of a summary, from the fullest on; the first that is short enough is printed."""


class PlanLike(Protocol):
    """The parts of a plan that the tables read."""

    @property
    def options(self) -> QuantizationOptions: ...
    @property
    def tensors(self) -> tuple[PlannedTensor, ...]: ...
    @property
    def weights(self) -> tuple[PlannedWeight, ...]: ...
    @property
    def left(self) -> tuple[LeftInFloat, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def changes(self) -> GraphChanges: ...
    @property
    def ranges(self) -> str: ...
    @property
    def simulated(self) -> tuple[str, ...]: ...


def summary(plan: PlanLike) -> RenderableType:
    """Return a summary of at most `SUMMARY_LINES` lines, with all notes if they fit, else with the starts of some."""
    sizes = (_summary(plan, rows, whole_notes) for whole_notes in (True, False) for rows in SUMMARY_SIZES)
    return next((each for each in sizes if len(as_text(each).splitlines()) <= SUMMARY_LINES), _title(plan))


def _summary(plan: PlanLike, rows: Rows, whole_notes: bool) -> Group:
    notes = [Text(note, overflow="ellipsis", no_wrap=not whole_notes) for note in _note_lines(plan)]
    shown = notes if whole_notes else notes[: rows.notes]
    lists = f"{REST} lists every tensor, and all that is in float."
    if len(shown) < len(notes):
        lists = f"{REST} lists every tensor, and {len(notes) - len(shown)} more notes."
    parts: list[RenderableType] = [_title(plan)]
    for part in (_kind_table(plan, rows.kinds), _block_table(plan, rows.blocks), _float_table(plan, rows.reasons)):
        parts += [Text(), part] if part.row_count else []
    parts += [*([Text()] if shown else []), *shown, Text(lists, "dim")]
    return Group(*parts)


def whole_table(plan: PlanLike) -> RenderableType:
    """Return the tables of all activations, of all weights, and of all that is in float, with its reason."""
    activations = table("activation", "scheme", "range", "read by")
    for t in plan.tensors:
        activations.add_row(t.quantizer_name, _scheme_text(t.scheme), _range_text(t), ", ".join(t.consumers))
    weights = table("weight of", "kind", "scheme", "range")
    for w in plan.weights:
        weights.add_row(w.name, w.operator, _scheme_text(w.scheme), _range_text(w))
    parts: list[RenderableType] = [_title(plan)]
    parts += [part for each in (activations, weights) if each.row_count for part in (Text(), each)]
    computing, results = _split_left_in_float(plan)
    for title, entries in (("Computes in float:", computing), ("Computes in integers, result in float:", results)):
        found = table("name", "operator", "because")
        for entry in entries:
            found.add_row(entry.name, entry.operator, entry.reason)
        parts += [Text(), Text(title, "bold"), found] if entries else []
    for note in _note_lines(plan):
        parts += [Text(), Text(note)]
    return Group(*parts)


def _title(plan: PlanLike) -> Group:
    options = plan.options
    computing, _ = _split_left_in_float(plan)
    first = f"Plan for {options.target}, {options.scheme}, {plan.ranges} ranges, BatchNorm {options.batchnorm}"
    quantized = f"{counted(len(plan.weights), 'quantized layer')}, {counted(len(plan.tensors), 'quantized activation')}"
    return Group(Text(first, "bold"), Text(f"{quantized}, {counted(len(computing), 'operator')} in float"))


def _note_lines(plan: PlanLike) -> list[str]:
    simulated = (
        f"Simulated alone, because {plan.options.target} has no integers of so many bits (export refuses this model): "
        f"{', '.join(plan.simulated)}"
    )
    return [*([simulated] if plan.simulated else []), *plan.notes, *str(plan.changes).splitlines()]


def _kind_table(plan: PlanLike, rows: int) -> Table:
    """Return a table of layers by kind and bits; rare kinds share the last row."""
    inputs = _input_bits(plan)
    ranges: dict[tuple[str, int, str], set[str]] = {}
    count: Counter[tuple[str, int, str]] = Counter()
    for weight in plan.weights:
        key = (weight.operator or "layer", weight.scheme.bits, inputs.get(weight.name, "float"))
        count[key] += 1
        ranges.setdefault(key, set()).add(_range_text(weight))
    found = table("layers", "number#", "weight bits#", "input bits#", "weight ranges")
    shown, rest = _cut_to_rows(count.most_common(), rows)
    for key, number in shown:
        kind, bits, read = key
        found.add_row(kind, str(number), str(bits), read, ", ".join(sorted(ranges[key])))
    if rest:
        all_bits = _joined_values(each for (_, each, _), _ in rest)
        all_read = _joined_values(each for (_, _, each), _ in rest)
        found.add_row(f"{len(rest)} other kinds", str(sum(number for _, number in rest)), all_bits, all_read, "")
    return found


def _input_bits(plan: PlanLike) -> dict[str, str]:
    """Return the bits of the tensors that each operator reads, by its name."""
    read: dict[str, set[int]] = {}
    for tensor in plan.tensors:
        for consumer in tensor.consumers:
            read.setdefault(consumer, set()).add(tensor.scheme.bits)
    return {name: _joined_values(bits) for name, bits in read.items()}


def _block_table(plan: PlanLike, rows: int) -> Table:
    """Return a table of the model's blocks, in their order; those at the end share the last row."""
    computing, _ = _split_left_in_float(plan)
    places = {tensor.places[0]: tensor.scheme.bits for tensor in plan.tensors}
    in_float = [left.name for left in computing]
    names = dict.fromkeys([*(weight.name for weight in plan.weights), *places, *in_float])
    blocks = _block_prefixes([weight.name for weight in plan.weights], rows)
    members: dict[str, list[str]] = {block: [] for block in blocks}
    for name in names:
        block = _innermost_block(name, blocks) or "elsewhere"
        members.setdefault(block, []).append(name)
    if not set(members.get("elsewhere", ())) & set(in_float):
        members.pop("elsewhere", None)  # inputs of the model, and what is fused into a block's layers
    weights = {weight.name: weight.scheme.bits for weight in plan.weights}
    found = table("block", "layers#", "weight bits#", "act. bits#", "in float#")
    shown, rest = _cut_to_rows(list(members.items()), rows)
    if rest:
        shown = [*shown, (f"{len(rest)} other blocks", [name for _, each in rest for name in each])]
    for block, each in shown:
        held = [name for name in each if name in weights]
        found.add_row(
            block,
            str(len(held)),
            _joined_values(weights[name] for name in held),
            _joined_values(places[name] for name in each if name in places),
            str(sum(name in set(in_float) for name in each)),
        )
    return found


def _innermost_block(name: str, blocks: Iterable[str]) -> str:
    """Return the block that a name is in, and not only in a block around it; "" for none.

    A layer may hold other layers: "gate" and "gate.down" are both blocks then.
    """
    around = [block for block in blocks if name == block or name.startswith((f"{block}.", f"{block}:"))]
    return max(around, key=len, default="")


def _block_prefixes(names: Sequence[str], most: int) -> list[str]:
    """Return prefixes that split names, in their order, into at most `most` groups, as evenly as that allows."""
    blocks = list(dict.fromkeys(_prefix(name, 1) for name in names))
    while True:
        # The largest block is divided by the next part of its names, as long as all blocks have a row.
        members: dict[str, list[str]] = {block: [] for block in blocks}
        for name in names:
            members[_innermost_block(name, blocks)].append(name)
        largest = max(blocks, key=lambda block: len(members[block]))
        depth = largest.count(".") + 2
        parts = list(dict.fromkeys(_prefix(name, depth) for name in members[largest]))
        if len(blocks) - 1 + len(parts) > most or parts == [largest] or len(members[largest]) <= FEW_LAYERS:
            return blocks
        place = blocks.index(largest)
        blocks[place : place + 1] = parts


def _prefix(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _float_table(plan: PlanLike, rows: int) -> Table:
    """Return the operators in float by reason, the most frequent first, with a name for an example."""
    computing, results = _split_left_in_float(plan)
    found = table("in float", "because")
    for what, entries in (("operator", computing), ("layer result", results)):
        shown, rest = _cut_to_rows(Counter(entry.reason for entry in entries).most_common(), rows)
        for reason, number in shown:
            example = next(entry.name for entry in entries if entry.reason == reason)
            found.add_row(counted(number, what), f"{reason}: {example}")
        if rest:
            found.add_row(counted(sum(number for _, number in rest), what), f"for {len(rest)} other reasons")
    return found


def _split_left_in_float(plan: PlanLike) -> tuple[list[LeftInFloat], list[LeftInFloat]]:
    """Return the operators that compute in float, and those that compute in integers and return floats.

    Where weights alone are quantized, their layers are neither: they read integers and compute in float.
    """
    integer = {weight.name for weight in plan.weights}
    integer |= {name for tensor in plan.tensors for name in tensor.consumers}
    computing = [left for left in plan.left if left.name not in integer]
    return computing, [left for left in plan.left if left.name in integer and plan.tensors]


def _cut_to_rows(items: list[T], rows: int) -> tuple[list[T], list[T]]:
    """Return the items that have a row of their own, and those that share the last row."""
    return (items, []) if len(items) <= rows else (items[: max(1, rows - 1)], items[max(1, rows - 1) :])


def _joined_values(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}, key=lambda text: (len(text), text)))


def _scheme_text(scheme: Scheme) -> str:
    """Return a scheme in few letters; that all weights leave out their grid's lowest integer goes without saying."""
    symmetric = "symmetric" if scheme.symmetric else "asymmetric"
    channels = "" if scheme.axis is None else ", per channel"
    power_of_two = ", power-of-two scale" if scheme.power_of_two else ""
    return f"{'s' if scheme.signed else 'u'}{scheme.bits} {symmetric}{channels}{power_of_two}"


def _range_text(tensor: PlannedTensor | PlannedWeight) -> str:
    if isinstance(tensor, PlannedTensor) and tensor.fixed_range:
        return f"fixed {list(tensor.fixed_range)}"
    by = f" by {tensor.quantizer}" if tensor.quantizer is not None else ""
    return f"{tensor.observer}{by}" if tensor.ranges == "observed" else f"{tensor.observer}, then {tensor.ranges}{by}"
