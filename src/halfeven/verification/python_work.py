"""Count the multiply-accumulates of the submodules that stayed Python: no graph shows them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from halfeven.layerwise.float_equivalence import float_function, run_example
from halfeven.placement.make_plan import regions


@dataclass(frozen=True)
class PythonWork:
    """Multiply-accumulates of a model that was captured in parts, for the two samples that it was captured with."""

    in_python: dict[str, int] = field(default_factory=dict)
    """Work of the submodules that stayed Python, by name."""
    in_regions: dict[str, int] = field(default_factory=dict)
    """Work of the captured regions, by name, all of their calls together."""


@torch.no_grad()
def python_work(qmodel: nn.Module) -> PythonWork:
    """Count the work inside and outside a quantized model's captured regions; none where no code stayed Python."""
    captured = regions(qmodel)
    kept = [_joined_path(name, path) for name, region in captured.items() for path in region.kept_rows]
    if "" in captured and not kept:
        return PythonWork()
    counts = _macs_by_module(qmodel)

    def own(name: str, others: Iterable[str]) -> int:
        """Return the work of a module, without the work of `others` that lie inside of it."""
        inside = [other for other in others if other != name and _is_inside(other, name)]
        # The count of a module has those of the modules inside it, so only the outermost are subtracted.
        direct = [other for other in inside if not any(_is_inside(other, outer) for outer in inside if outer != other)]
        return counts.get(name, 0) - sum(counts.get(other, 0) for other in direct)

    # A region without the modules that stay Python inside of it, and these without regions inside of them.
    in_regions = {name: own(name, kept) for name in captured}
    in_python = {name: own(name, captured) for name in kept}
    if "" not in captured:
        in_python |= _work_outside_regions(qmodel, captured, counts)
    return PythonWork({name: count for name, count in in_python.items() if count}, in_regions)


def _macs_by_module(qmodel: nn.Module) -> dict[str, int]:
    """Return the work of each module, its submodules included, by name; "" is the model."""
    counter = FlopCounterMode(display=False)
    # oneDNN's recurrent cells and fused attention are operators that the counter does not know.
    with float_function(qmodel), torch.backends.mkldnn.flags(enabled=False), _written_out_attention(), counter:
        run_example(qmodel)
    prefix = f"{type(qmodel).__name__}."
    # The counter counts a multiply-accumulate as two operations.
    found = {name.removeprefix(prefix): sum(rows.values()) // 2 for name, rows in counter.get_flop_counts().items()}
    return {**found, "": found["Global"]}


def _work_outside_regions(qmodel: nn.Module, captured: Iterable[str], counts: dict[str, int]) -> dict[str, int]:
    """Return the work of the outermost submodules around no region, and of the model's own code."""
    found: dict[str, int] = {}
    for name, _ in qmodel.named_modules():
        inside = any(_is_inside(name, outer) for outer in (*captured, *found))
        around = any(_is_inside(region, name) for region in captured)
        if not inside and not around and counts.get(name):
            found[name] = counts[name]
    seen = sum(found.values()) + sum(counts.get(name, 0) for name in captured if not _is_nested(name, captured))
    return {**found, "(the model's own code)": counts[""] - seen}


def _is_nested(name: str, captured: Iterable[str]) -> bool:
    return any(other != name and _is_inside(name, other) for other in captured)


def _joined_path(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def _is_inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.") or not outer


def _written_out_attention() -> Any:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
