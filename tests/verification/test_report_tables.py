"""The printed report: 80 columns, names that stay below their row, and 100 % only where all integers are equal."""

import dataclasses

import pytest

from halfeven.verification.report import Report, TensorParity

LONG = "bert.encoder.layer.0.attention.self.matmul"
COUNTS = ("samples", "integer_layers", "quantizable_layers", "weight_layers", "max_lsb_difference", "latency_batch")
SHARES = (
    *("integer_match", "alone_match", "last_integer_match", "float_simulation_match", "integer_macs"),
    *("top1_agreement", "float_simulation_top1_agreement", "latency_ratio"),
)


@pytest.fixture
def report():
    return Report(
        path="m.onnx", runtime="a runtime", weights_match=True, float_layers=[], accuracy={}, float_macs={LONG: 0.01},
        output_difference=0.0, latency_ms={}, unseen=[], first_difference="x", tensors=[TensorParity("x", count=3)],
        **dict.fromkeys(COUNTS, 1), **dict.fromkeys(SHARES, 1.0),
    )  # fmt: skip


def test_one_integer_of_millions_that_differs_is_seen(report):
    assert str(report).count("100.0000 %") == 6
    text = str(dataclasses.replace(report, integer_match=1 - 1e-9, alone_match=1 - 1e-9))
    assert text.count("100.0000 %") == 4
    assert text.count("99.9999 %") == 2


def test_a_long_name_goes_on_below_its_row(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    row = next(number for number, line in enumerate(lines) if line.startswith("    in float,"))
    assert lines[row].endswith("1.00 %")
    assert lines[row + 1] == f"      {LONG[:38]}"
    assert lines[row + 2] == f"      {LONG[38:]}"


def test_the_lines_of_a_finding_are_indented_alike(report):
    lines = str(dataclasses.replace(report, findings=["A finding of many words. " * 8])).splitlines()
    below = lines[lines.index("FOUND:") + 1 :]
    assert len(below) >= 2
    assert all(line.startswith("  ") for line in below)
    assert max(map(len, below)) <= 80


def test_a_list_cut_to_a_row_shows_its_first_entry_and_counts_the_rest(report):
    """A full report names neither "others" nor "more" where nothing stands before them."""
    layers = [f"layer{number} (f32 Conv)" for number in range(15)]
    macs = {f"layer{number}": 0.05 for number in range(15)}
    times = {"float": 2.0, "deployed": 1.0}
    kernels = [f"k{number} (Conv, u8): 9%" for number in range(3)]
    settings = ["a=1", "b=2"]
    changes = {"float_layers": layers, "float_macs": macs, "latency_ms": times, "slowest_kernels": kernels}
    accuracy = dict.fromkeys(("float", "simulated", "deployed"), 90.0)
    full = dataclasses.replace(report, **changes, settings=settings, accuracy=accuracy, file_bytes=9)
    text = " ".join(str(full).split())
    assert "in float, 15 together 75.00 %" in text
    assert "in float layer0 (f32 Conv); 14 more: print(report.table())" in text
    assert "slowest kernel k0 (Conv, u8): 9%; 2 more: print(report.table())" in text
    assert "others" not in text
    assert text.count("more") == 2


def test_a_file_for_another_runtime_says_why_layers_are_in_float(report):
    reason = 'made for openvino; use target="onnxruntime"'
    lines = str(dataclasses.replace(report, float_layers=["a (f32 Conv)"], float_reason=reason)).splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("    likely reason"))
    assert " ".join(line.strip() for line in lines[row : row + 2]).endswith(reason)
    assert max(map(len, lines)) <= 80
