"""Fold the entries of a plan by the blocks of the model, for a page."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

OUTSIDE = "(outside of blocks)"


def plan_blocks(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the blocks of a plan in the order of the network: name, lines, and how many are quantized and in float.

    Args:
        plan: plain values, from `Plan.to_dict`; empty: there are no blocks.
    """
    if not plan:
        return []
    blocks: dict[str, dict[str, Any]] = {}
    for name, kind, line in _entries(plan):
        empty = {"name": _block_of(name), "lines": [], "quantized": 0, "in_float": 0}
        block = blocks.setdefault(_block_of(name), empty)
        block["lines"].append(line)
        if kind:
            block[kind] += 1
    places = _block_places(plan)
    return [blocks[name] for name in sorted(blocks, key=lambda block: places[block])]


def _block_of(name: str) -> str:
    """Return the first part of a name, and the second if it is a number."""
    found = re.match(r"[^.]+(\.\d+(?=\.|$))?", name)
    return found[0] if found and "." in name else OUTSIDE


def _entries(plan: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the name of each entry, whether it counts as "quantized" or "in_float" or not at all (""), and its text.

    A layer that reads integers and whose result alone is in float counts once, by its weight.
    """
    for tensor in plan["tensors"]:
        readers = ", ".join(tensor["consumers"])
        places = " = ".join(tensor["places"])
        yield tensor["places"][0], "quantized", f"{places}: {_bits(tensor['scheme'])}, read by {readers}"
    for weight in plan["weights"]:
        yield weight["name"], "quantized", f"weight of {weight['name']}: {_bits(weight['scheme'])}"
    integer = {weight["name"] for weight in plan["weights"]}
    integer.update(name for tensor in plan["tensors"] for name in tensor["consumers"])
    for left in plan["left"]:
        name = left["name"]
        in_integers = name in integer and plan["tensors"]
        what = "result in float" if in_integers else "in float"
        yield name, "" if in_integers else "in_float", f"{name} ({left['operator']}), {what}: {left['reason']}"


def _bits(scheme: Mapping[str, Any]) -> str:
    return f"{scheme['bits']} bits{'' if scheme['axis'] is None else ', a scale per channel'}"


def _block_places(plan: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return the place of each block in the network, as a key to sort by.

    A block stands where its first layer with a weight stands. Without weights, it stands before the first layer that
    reads a tensor of it; without tensors too, behind the operator that precedes it among those in float.
    """
    layers: dict[str, tuple[float, ...]] = {}
    blocks: dict[str, tuple[float, ...]] = {}
    for place, weight in enumerate(plan["weights"]):
        layers.setdefault(weight["name"], (place,))
        blocks.setdefault(_block_of(weight["name"]), (place,))
    tensors = plan["tensors"]
    # Backward: a reader without a weight, such as a pool, has its place from the readers of its own output.
    for number in range(len(tensors) - 1, -1, -1):
        read = [layers[name] for name in tensors[number]["consumers"] if name in layers]
        first = min(read, default=(math.inf,))[0]
        for name in tensors[number]["places"]:
            layers.setdefault(name, (first - 0.5, number))
    for tensor in tensors:
        blocks.setdefault(_block_of(tensor["places"][0]), layers[tensor["places"][0]])
    left = [entry["name"] for entry in plan["left"]]
    for before, name in pairwise(["", *left]):
        behind = (blocks.get(_block_of(before), (-1.0,))[0] + 0.5,)
        blocks.setdefault(_block_of(name), layers.get(name, behind))
    return blocks
