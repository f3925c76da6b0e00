"""Pages of reports: one file, nothing from elsewhere, every text as text."""

import json
import re
from html.parser import HTMLParser

import pytest

from halfeven.reporting.page import PageContents, charting_library, page, save_page
from halfeven.reporting.verification_page import verification_contents
from halfeven.verification.report import Report, TensorParity

TENSOR = {
    "name": "</script><b>layer</b>", "weight": False, "scheme": "u8", "bits": 8, "kl_in_context": 0.5, "kl_alone": 0.1,
    "sqnr": float("inf"), "worst_channels": [[3, 2.0]], "histogram": [1, 2], "smallest": 0.0, "largest": 1.0,
}  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text in its scripts."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.texts = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def read(text):
    elements = Elements()
    elements.feed(text)
    return elements


def test_a_page_is_one_file_whose_data_cannot_leave_their_element():
    contents = PageContents(title="A <title>", verdict="Good & fast", tensors=(TENSOR,), notes=("</script>",))
    elements = read(page(contents, "const library = '</script>';"))
    assert [tag for tag, _ in elements.found].count("script") == 4
    assert not any({"src", "href"} & attributes.keys() - {"rel"} for tag, attributes in elements.found if tag != "link")
    assert [a["href"] for tag, a in elements.found if tag == "link"] == ["data:,"]
    data = json.loads(next(text for text in elements.texts if text.startswith('{"title"')))
    assert data["title"] == "A <title>"
    assert data["tensors"][0]["name"] == TENSOR["name"]
    assert data["tensors"][0]["sqnr"] is None  # JSON has no infinity
    policy = next(a["content"] for tag, a in elements.found if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_a_page_with_its_charts_is_small(tmp_path):
    pytest.importorskip("vl_convert")
    library = charting_library()
    assert "vegaEmbed" in library
    path = save_page(PageContents(title="a", verdict="b", tensors=(TENSOR,) * 300), tmp_path / "report.html")
    assert path.stat().st_size < 2e6
    text = path.read_text()
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=\"?https?:", text)


def test_a_verified_file_has_a_page():
    report = Report(
        path="work/model.xml", runtime="a runtime", samples=8, integer_match=1.0, alone_match=1.0,
        last_integer_match=1.0, float_simulation_match=0.99, max_lsb_difference=0, weights_match=True, integer_layers=3,
        quantizable_layers=4, weight_layers=0, float_layers=["head"], integer_macs=0.9, float_macs={"head": 0.1},
        output_difference=0.0, top1_agreement=1.0, float_simulation_top1_agreement=1.0,
        accuracy={"float": 90.0, "deployed": 89.5}, latency_ms={"float": 2.0, "deployed": 1.0}, latency_batch=1,
        latency_ratio=0.5, unseen=[], first_difference="", tensors=[TensorParity("relu", count=10)],
    )  # fmt: skip
    contents = verification_contents(report, sizes={"model.bin": 1000})
    assert contents.verdict == (
        "The file computes what was simulated, and 3 of 4 layers run in integers; accuracy deployed is 89.50 %, -0.50 "
        "against float."
    )
    assert contents.tables["Integers in the file"][1][:3] == ("relu", "10", "0")
    assert contents.tables["Work in float"][1] == ("head", "10.00 %")
    report.findings.append("The output differs.")
    assert verification_contents(report).verdict.startswith(
        "The file differs from the float simulation, and equals the exact one; accuracy"
    )
    report.alone_match = 0.5
    assert verification_contents(report).verdict.startswith("The file differs from the simulation; accuracy")
