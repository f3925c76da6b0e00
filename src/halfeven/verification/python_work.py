"""Count the multiply-accumulates of the submodules that stayed Python: no graph shows them."""

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
    """Of the submodules that stayed Python, by name."""
    in_regions: dict[str, int] = field(default_factory=dict)
    """Of the captured regions, by name, all of their calls together."""


@torch.no_grad()
def python_work(qmodel: nn.Module) -> PythonWork:
    """Count the work inside and outside a quantized model's captured regions; none for a model captured whole."""
    captured = regions(qmodel)
    if "" in captured:
        return PythonWork()
    counter = FlopCounterMode(display=False)
    # oneDNN's recurrent cells and fused attention are operators that the counter does not know.
    with float_function(qmodel), torch.backends.mkldnn.flags(enabled=False), _written_out_attention(), counter:
        run_example(qmodel)
    prefix = f"{type(qmodel).__name__}."
    counts = {name.removeprefix(prefix): sum(found.values()) // 2 for name, found in counter.get_flop_counts().items()}
    in_regions = {name: counts.get(name, 0) for name in captured}
    found: dict[str, int] = {}
    for name, _ in qmodel.named_modules():
        inside = any(_lies_in(name, outer) for outer in (*captured, *found))
        around = any(_lies_in(region, name) for region in captured)
        if not inside and not around and counts.get(name):
            found[name] = counts[name]
    seen = sum(found.values()) + sum(in_regions.values())
    if counts["Global"] > seen:
        found["(the model's own code)"] = counts["Global"] - seen
    return PythonWork(found, in_regions)


def _lies_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.") or not outer


def _written_out_attention() -> Any:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
