"""Prepare the HTML of the pages: long names in code break at their dots on a phone, and options stay whole."""

import re
from typing import Any

CODE = re.compile(r"<pre\b.*?</pre>|<script\b.*?</script>|<code>(?P<text>[^<]*)</code>", re.DOTALL)
OPTION = re.compile(r"--[a-z][a-z-]*")
BREAK = re.compile(r"(?<=[\w)])([._/=,(]+)(?=[\w\"'*(])")
SHORT = 16
"""Characters of code that fits in a line of a phone, and stays whole."""


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with places in inline code at which a line may break; mkdocs calls this for each page."""
    return CODE.sub(_with_breaks, html)


def _with_breaks(found: re.Match[str]) -> str:
    text = found["text"]
    if text is None:  # a block of code, which scrolls
        return found[0]
    # Browsers break a line behind the dashes of an option.
    broken = BREAK.sub(r"\1<wbr>", text) if len(text) > SHORT else text
    return f"<code>{OPTION.sub(_whole, broken)}</code>"


def _whole(option: re.Match[str]) -> str:
    return f'<span class="whole">{option[0]}</span>'
