"""Show a search on a page: its plans as points of cost and divergence, and as a table."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from halfeven.placement.options import rule_text
from halfeven.reporting.page import PageContents

Values = Mapping[str, Any]
"""The values of `SearchResult.to_dict`, or of the file that they were written to."""

PLANS_HEADING = "Plans of the search"
"""Heading of their table."""


def with_search(contents: PageContents, found: Values) -> PageContents:
    """Return the contents of a page with the plans of a search.

    Args:
        contents: of the page.
        found: the search's result as plain values.
    """
    return dataclasses.replace(
        contents,
        plans=tuple(_chart_point(step, found) for step in found["steps"]),
        plans_cost=COST_TITLES[_compared_cost(found)],
        tables={PLANS_HEADING: _step_table(found), **contents.tables},
        notes=(*contents.notes, *found["notes"]),
        paste=_rules_text(found["rules"]),
    )


def search_contents(found: Values, plan: Values) -> PageContents:
    """Return the contents of a search's own page."""
    steps = found["steps"]
    drop = "" if found["drop"] is None else f", {found['unit']} {_drop_text(found['drop'])}"
    latency = "" if found["latency"] is None else f", latency {found['latency']:.3f} of the float file's"
    kept = "All budgets are kept" if found["reached"] else "The budgets are not kept"
    chosen = steps[found["chosen"]]
    contents = PageContents(
        title="Search of a mixed-precision plan",
        verdict=f"{kept} after {found['chosen']} of {len(steps) - 1} steps{drop}{latency}.",
        facts={
            "mean bits": f"{chosen['cost']['bits']:.2f}",
            "weights": f"{chosen['cost']['size'] / 1000:.1f} kB",
            "activations raised": str(chosen["cost"]["tensors"]),
            "divergence": f"{steps[0]['divergence']:.3g} → {chosen['divergence']:.3g}",
        },
        plan=plan,
    )
    return with_search(contents, found)


def _compared_cost(found: Values) -> str:
    """Return the name of the cost by which plans are compared."""
    if found["steps"][0]["cost"]["latency"] is not None:
        return "latency"
    # Where weights alone are quantized, the work is the same in all plans.
    return "work" if len({step["cost"]["work"] for step in found["steps"]}) > 1 else "size"


COST_TITLES = {
    "latency": "estimated time, of the float file's",
    "work": "work, of the scheme's",
    "size": "size of the weights, of the scheme's",
}


def _chart_point(step: Values, found: Values) -> dict[str, Any]:
    """Return a step as a point of the chart."""
    cost = step["cost"]
    name = _compared_cost(found)
    first = found["steps"][0]["cost"][name] or 1.0
    return {
        "number": step["number"],
        "change": _step_change(step),
        "cost": cost[name] if name == "latency" else cost[name] / first,
        "divergence": step["divergence"],
        "drop": None if step["judgement"] is None else _drop_text(step["judgement"]),
        "bits": cost["bits"],
        "kind": _step_kind(step["number"], found),
    }


def _step_kind(number: int, found: Values) -> str:
    if number == found["chosen"]:
        return "chosen"
    return "Pareto" if number in found["pareto"] else "other"


def _step_table(found: Values) -> tuple[tuple[str, ...], ...]:
    """Return the table of all plans, with a column for the drop and for the time where any was measured."""
    columns: dict[str, Callable[[Values], str]] = {
        "step": lambda step: f"{step['number']}. {_step_change(step)}",
        "": lambda step: _step_kind(step["number"], found).replace("other", ""),
        "divergence": lambda step: f"{step['divergence']:.4g}",
        found["unit"]: lambda step: "" if step["judgement"] is None else _drop_text(step["judgement"]),
        "mean bits": lambda step: f"{step['cost']['bits']:.2f}",
        "weights, kB": lambda step: f"{step['cost']['size'] / 1000:.1f}",
        "latency": lambda step: "" if step["cost"]["latency"] is None else f"{step['cost']['latency']:.3f}",
        "because": lambda step: str(step["reason"]),
    }
    shown = {title: [text(step) for step in found["steps"]] for title, text in columns.items()}
    shown = {title: texts for title, texts in shown.items() if any(texts)}
    return (tuple(shown), *zip(*shown.values(), strict=True))


def _step_change(step: Values) -> str:
    return f"{step['unit']}: {step['change']}" if step["unit"] else "the scheme"


def _drop_text(values: Values) -> str:
    interval = values["interval"]
    return f"{values['drop']:.3g}" + ("" if interval is None else f" ± {interval:.2g}")


def _rules_text(rules: Any) -> str:
    lines = [f"    {rule_text(rule)}," for rule in rules]
    return "\n".join(["rules=(", *lines, ")"]) if lines else ""
