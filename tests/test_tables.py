"""Tables that are printed, and shown in notebooks."""

import pytest

from halfeven.tables import as_html, as_text, counted, percent, table, text_as_html


def test_a_notebook_shows_a_table_once(monkeypatch):
    """rich's console shows what it prints in a notebook, beside the cell's own output."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("The table was shown beside the cell's output."))
    content = table("layer", "bits#")
    content.add_row("conv1", "8")
    assert "conv1" in as_html(content)
    assert as_text(content).splitlines()[1].split() == ["conv1", "8"]


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (1.0, 4, "100.0000 %"),
        (1 - 1e-9, 4, "99.9999 %"),
        (0.9999994, 4, "99.9999 %"),
        (0.5, 4, "50.0000 %"),
        (0.9999, 1, "99.9 %"),
        (0.994, 0, "99 %"),
        (0.999, 0, "99 %"),
        (0.0, 2, "0.00 %"),
    ],
)
def test_100_percent_is_all(share, digits, text):
    assert percent(share, digits) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers")])
def test_one_thing_is_no_plural(number, text):
    assert counted(number, "layer") == text


def test_a_text_in_a_notebook_keeps_its_lines_and_its_brackets():
    html = text_as_html("a <b> [red]\n" + "x" * 200)
    assert "a &lt;b&gt; [red]\n" in html
    assert "x" * 200 in html
