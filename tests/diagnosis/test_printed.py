"""The diagnosis as it is printed: names that rules match, and a notebook shows the text."""

from halfeven.diagnosis.diagnosis import Diagnosis, TensorDiagnosis

FIGURES = dict.fromkeys(
    ("kl_in_context", "kl_alone", "sqnr", "sqnr_of_outputs", "clipped_share", "vanished_share", "dead_levels", "low"),
    0.5,
)
TENSOR = TensorDiagnosis(
    name="1_relu", weight=False, places=("1.relu", "2.add"), scheme="u8", bits=8, observer="mse", raised_bits=None,
    worst_channels=(), high=1.0, **FIGURES,
)  # fmt: skip
FOUND = Diagnosis(
    verdict="It is <one> tensor.", samples=8, divergence=1.0, divergence_without_quantizers=0.0,
    divergence_of_weights=0.0, divergence_of_activations=1.0, sqnr=5.0, error_share=0.1, agreement=0.5,
    tensors=(TENSOR,), findings=(), order=(("1_relu", False),), notes=("A note.", "Another."),
)  # fmt: skip


def test_tensors_are_called_as_in_the_plan():
    assert "\n1.relu = 2.add " in str(FOUND)
    (shown,) = FOUND._page_contents().tensors
    assert shown["name"] == "1.relu = 2.add"


def test_notes_stand_below_the_table():
    assert str(FOUND).endswith("\n\nA note.\nAnother.")


def test_a_notebook_shows_the_text_and_not_all_fields():
    html = FOUND._repr_html_()
    assert "It is &lt;one&gt; tensor." in html
    assert "TensorDiagnosis" not in html
