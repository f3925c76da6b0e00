"""The result of a search: the model, the rules, and the plans on the way."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import ConfigError
from halfeven.files import json_value
from halfeven.mixed_precision.judge import Judgement
from halfeven.mixed_precision.result_page import search_contents
from halfeven.mixed_precision.walk import SearchStep
from halfeven.placement.insertion import plan_of
from halfeven.placement.options import Rule, rule_text
from halfeven.quantization.own_class import plain_values
from halfeven.reporting.page import save_page
from halfeven.tables import text_as_html


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The cheapest plan that a search has found; `str(result)` is a table of the plans on the way."""

    qmodel: nn.Module
    """The quantized model, in eval mode."""
    rules: tuple[Rule, ...]
    """The rules that make it, to paste into a config."""
    reached: bool
    """True if it keeps all budgets."""
    chosen: int
    """The number of steps of its plan."""
    steps: tuple[SearchStep, ...]
    """All plans on the way, from the scheme's."""
    unit: str
    """The words for a drop."""
    judgement: Judgement | None
    """The drop of `qmodel` itself; None with neither a metric nor a budget for it."""
    latency: float | None
    """Measured time of its file over the float file's in the runtime's default precision; None where it was not
    measured."""
    notes: tuple[str, ...] = ()
    """Budgets that were not reached, and limits of what was measured."""

    @property
    def pareto(self) -> tuple[SearchStep, ...]:
        """The plans that no cheaper plan is at least as good as, the cheapest first: by time where it was measured."""
        found: list[SearchStep] = []
        # From the cheapest on, a plan is on the front if it is better than all before it.
        for step in sorted(self.steps, key=lambda step: (_compared_cost(step), step.divergence)):
            if not found or step.divergence < found[-1].divergence:
                found.append(step)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON, without the model."""
        return {
            "reached": self.reached,
            "chosen": self.chosen,
            "rules": [plain_values(rule) for rule in self.rules],
            "unit": self.unit,
            "drop": None if self.judgement is None else dataclasses.asdict(self.judgement),
            "latency": self.latency,
            "steps": [_step_values(step) for step in self.steps],
            "pareto": [step.number for step in self.pareto],
            "notes": list(self.notes),
        }

    @checked_arguments(ConfigError)
    def save(self, path: str | Path) -> Path:
        """Write the result as one HTML page with charts, and return its path.

        Raises:
            ConfigError: the package that draws the charts is not installed.
            StorageError: the page cannot be written.
        """
        return save_page(search_contents(self.to_dict(), plan_of(self.qmodel).to_dict()), path)

    def __str__(self) -> str:
        """Return the plans on the way as a table, the verdict, and the rules to paste."""
        pareto = {step.number for step in self.pareto}
        header = ("", "step", "change", "divergence", self.unit, "bits", "size, kB", "latency", "because")
        rows = [_step_row(step, chosen=step.number == self.chosen, best=step.number in pareto) for step in self.steps]
        drop = f"{self.unit} {self.judgement}" if self.judgement is not None else "drop not measured"
        latency = f", latency {self.latency:.3f} of the float file's" if self.latency is not None else ""
        verdict = "All budgets are kept" if self.reached else "NOT REACHED"
        lines = [*_table_lines(header, rows), "(> chosen, * no cheaper plan is as good)", ""]
        lines += [f"{verdict} after {self.chosen} steps: {drop}{latency}.", *self.notes]
        lines += ["", "rules=(", *(f"    {rule_text(vars(rule))}," for rule in self.rules), ")"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return text_as_html(str(self))


def _compared_cost(step: SearchStep) -> tuple[float, float]:
    # Where weights alone are quantized, the work is the same in all plans, and their size is not.
    return (step.cost.work if step.cost.latency is None else step.cost.latency), step.cost.size


def _step_values(step: SearchStep) -> dict[str, Any]:
    values: dict[str, Any] = json_value(dataclasses.asdict(step))
    values["cost"]["work"] = step.cost.work
    return values


def _step_row(step: SearchStep, *, chosen: bool, best: bool) -> tuple[str, ...]:
    """Return the row of a step in the printed table."""
    cost = step.cost
    return (
        (">" if chosen else "") + ("*" if best else ""),
        str(step.number),
        step.title,
        f"{step.divergence:.4g}",
        "" if step.judgement is None else str(step.judgement),
        f"{cost.bits:.2f}",
        f"{cost.size / 1000:.1f}",
        "" if cost.latency is None else f"{cost.latency:.3f}",
        step.reason,
    )


def _table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
