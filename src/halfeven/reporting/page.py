"""Write a report as one HTML page that loads nothing from elsewhere.

The page is made of four files beside this one: `page.html`, `page.css`, `page.js`, which draws the sections from the
page's data, and `charts.js`, which describes the charts. Vega-Lite (vega.github.io) draws these: it takes a description
and data, its chart is as wide as its place, knows light and dark, and a whole copy of it has 0.9 MB.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from halfeven.files import json_value, write_atomically
from halfeven.imports import extra
from halfeven.reporting.plan_blocks import plan_blocks


@dataclass(frozen=True, kw_only=True)
class PageContents:
    """The contents of a page; a section without contents is left out."""

    title: str
    verdict: str
    """The result in one sentence."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Single numbers, by what they are."""
    findings: tuple[Mapping[str, Any], ...] = ()
    """Each with cause, where, evidence, remedy, paste, recovered and tried."""
    tensors: tuple[Mapping[str, Any], ...] = ()
    """One of each quantized tensor, in the order of the network."""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Accuracy of the float, the simulated and the deployed model."""
    sizes: Mapping[str, float] = field(default_factory=dict)
    """Bytes, by what has them."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds, by what was timed."""
    layers: tuple[Mapping[str, Any], ...] = ()
    """Time by layer, each with name, integer, and the milliseconds deployed and floating (in the float file)."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """A plan as plain values."""
    plans: tuple[Mapping[str, Any], ...] = ()
    """Plans of a search, each with number, change, cost, divergence, drop, bits and kind."""
    plans_cost: str = ""
    """Name and unit of their cost."""
    paste: str = ""
    """Lines to paste into a config."""
    tables: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Further tables by their headings; the first row is the header."""
    notes: tuple[str, ...] = ()


def save_page(contents: PageContents, path: str | Path) -> Path:
    """Write a page, whole or not at all, and return its path.

    Raises:
        ConfigError: the package that draws the charts is not installed.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    write_atomically(path, lambda temporary: temporary.write_text(page(contents, charting_library()), encoding="utf-8"))
    return path


def charting_library() -> str:
    """Return Vega-Lite with all that it needs, as a script.

    Raises:
        ConfigError: the package that contains it is not installed.
    """
    with extra("train", "A report with charts"):
        bundler: Any = importlib.import_module("vl_convert")
    return _bundle(bundler)


@cache
def _bundle(bundler: Any) -> str:
    script: str = bundler.javascript_bundle("window.vegaEmbed = vegaEmbed;")  # 2 s each time
    return script


def page(contents: PageContents, library: str) -> str:
    """Return the HTML of a page.

    Args:
        contents: what it shows.
        library: the script that draws charts.
    """
    values = asdict(contents) | {"plan_blocks": plan_blocks(contents.plan)}
    data = json.dumps(json_value(values), ensure_ascii=False)
    parts = {
        "STYLE": _asset_text("page.css"),
        "LIBRARY": library,
        "CHARTS": _asset_text("charts.js"),
        "PAGE": _asset_text("page.js"),
        # "</script>" within a string would end the element.
        "DATA": data.replace("<", "\\u003c"),
    }
    text = _asset_text("page.html")
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part.replace("</script", "<\\/script") if name != "DATA" else part)
    return text


def _asset_text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
