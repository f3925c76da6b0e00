"""Tables that are printed, and shown in notebooks."""

import pytest

from halfeven.tables import as_html, as_text, table


def test_a_notebook_shows_a_table_once(monkeypatch):
    """rich's console shows what it prints in a notebook, beside the cell's own output."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("The table was shown beside the cell's output."))
    content = table("layer", "bits#")
    content.add_row("conv1", "8")
    assert "conv1" in as_html(content)
    assert as_text(content).splitlines()[1].split() == ["conv1", "8"]
