"""Planted faults, and the first finding of each: it names the cause, and what it says to paste repairs it."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.diagnosis.checks import unsettled_batchnorm
from halfeven.diagnosis.diagnosis import MAX_LINES, TEXT_WIDTH, Diagnosis, Finding
from halfeven.diagnosis.remedies import equalization
from halfeven.diagnosis.sensitivity import divergence_of, reference_of
from halfeven.diagnosis.trials import rules_argument
from halfeven.errors import CalibrationError, ConfigError, HalfevenError
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.placement.options import rule_text
from halfeven.ptq.options import PTQOptions
from halfeven.reporting.page import page
from sweeps import sweep

from .faulty_nets import FAULTS, Faulty, Mixer, faulty


class Classes(nn.Module):
    """Returns the numbers of classes alone."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(6, 3)

    def forward(self, x):
        return self.scores(x).argmax(1)


CAUSES = {
    "front_end": "front end",
    "additive_mask": "mask",
    "scaled_depthwise_channel": "badly scaled channels",
    "outlier_channel": "outlier channel after LayerNorm",
    "unsettled_batchnorm": "running statistics do not describe",
    "shared_range": "share one range",
    "unlike_inputs": "share one range",
    "few_bits": "2 bits are too few",
    "narrow_range": "clips",
    "channel_made_up_for": "outlier channel",
    "projection_made_up_for": "outlier channel after LayerNorm",
    "unlike_rows": "badly scaled channels",
    "narrow_ranges": "clips",
}
"""Fault -> words of the cause."""
SLOW = {"front_end", "narrow_range", "unlike_inputs", "unlike_rows", "narrow_ranges", "projection_made_up_for"}
"""They run with --exhaustive."""


def quantized(fault, **changes):
    options = {**fault.options, **changes}
    options["rules"] = (*fault.options.get("rules", ()), *changes.get("rules", ()))
    ptq = {name: options.pop(name) for name in list(options) if hasattr(PTQOptions(), name)}
    if ptq:
        off = {"reconstruct": "off", "correct_biases": "off", "equalize": "off", "smooth": "off"}
        return he.quantize(fault.model, fault.batches, **{**off, "reparametrize": "off", **ptq}, **options)
    qmodel = he.prepare(fault.model, fault.batches[0], **options)
    return he.calibrate(qmodel, fault.batches).eval()


def diagnosed(qmodel, fault, **options):
    return he.diagnose(qmodel, fault.model, fault.batches, runtime=False, **options)


@pytest.mark.filterwarnings("ignore::halfeven.errors.HalfevenWarning")
@pytest.mark.parametrize("name", sweep(FAULTS, *(name for name in FAULTS if name not in SLOW)))
def test_the_first_finding_names_the_cause_and_its_line_repairs_the_model(name):
    fault = faulty(name)
    qmodel = quantized(fault)
    found = diagnosed(qmodel, fault)
    first = found.findings[0]
    assert CAUSES[name] in first.cause
    if name == "unsettled_batchnorm":
        assert "re_estimate(model, batches)" in first.paste
        re_estimate(fault.model, fault.batches)
        settled = diagnosed(quantized(fault), fault)
        assert not any("running statistics" in finding.cause for finding in settled.findings)
        return
    pasted = eval(f"dict({first.paste})", {"Rule": he.Rule})  # as a user pastes it into a call
    assert pasted == ({"rules": first.rules} if first.rules else first.options)
    reference = reference_of(qmodel, fault.batches, float_model=fault.model)
    repaired = divergence_of(quantized(fault, **pasted), reference)
    assert repaired < 0.3 * found.divergence
    assert first.recovered > 0.7


def test_ranges_of_other_data_and_weights_of_another_model_are_told():
    fault = faulty("few_bits")
    other = [5e-2 * batch for batch in fault.batches]
    qmodel = he.calibrate(he.prepare(fault.model, fault.batches[0]), other).eval()
    first = diagnosed(qmodel, fault).findings[0]
    assert "do not fit these batches" in first.cause
    assert first.recovered > 0.9
    he.calibrate(qmodel, fault.batches)
    with torch.no_grad():
        qmodel.get_submodule("8").weight.mul_(-1)
    assert "without its quantizers" in diagnosed(qmodel, fault).findings[0].cause


@pytest.mark.parametrize("batch_size", [16, 2])
def test_statistics_set_by_hand_in_a_frozen_model_are_unsettled(batch_size):
    """The counter of batches is 0, as in weights converted from another framework, and no parameter is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model[1].running_mean.fill_(3)
    x = torch.randn(32, 6)
    assert unsettled_batchnorm(model.requires_grad_(False), [((row,), {}) for row in x.split(batch_size)])
    model[1].reset_running_stats()
    fault = Faulty(model, list((4 * x + 3).split(batch_size)))
    found = he.diagnose(quantized(fault), model, [4 * x + 3], runtime=False)
    assert "the model is not trained" in found.findings[-1].evidence


def test_a_wrong_metric_is_refused_before_the_work_and_a_right_one_sees_eval_mode():
    fault = Faulty(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), list(torch.randn(32, 6).split(16)))
    qmodel = quantized(fault)
    for wrong in (lambda model: float("nan"), lambda model: None, lambda model: {"top1": 1.0}):
        with pytest.raises(ConfigError, match="which is no metric"):
            diagnosed(qmodel, fault, evaluate=wrong)
    with pytest.raises(ConfigError, match="ended with ZeroDivisionError"):
        diagnosed(qmodel, fault, evaluate=lambda model: 1 / 0)
    seen = diagnosed(qmodel.train(), fault, evaluate=lambda model: torch.full((4,), float(model.training)))
    assert seen.accuracy == {"float": 0.0, "quantized": 0.0}
    assert qmodel.training


def test_weights_with_learned_rounding_are_not_taken_for_those_of_another_model():
    torch.manual_seed(0)
    fault = Faulty(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), [torch.randn(32, 6)])
    qmodel = he.quantize(fault.model, fault.batches, scheme="w2a8", reconstruct="layers", iterations=5)
    first = diagnosed(qmodel, fault).findings[0]
    assert "2 bits are too few for weights" in first.cause
    assert eval(f"dict({first.paste})", {"Rule": he.Rule}) == {"rules": first.rules}


def test_models_that_cannot_be_compared_are_refused():
    fault = Faulty(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), list(torch.randn(32, 6).split(16)))
    qmodel = quantized(fault)
    for other, message in (
        (qmodel, "is a quantized model"),
        (nn.Linear(6, 4), "shapes"),
        (nn.Linear(5, 3), "cannot be"),
    ):
        with pytest.raises(HalfevenError, match=message):
            he.diagnose(qmodel, other, fault.batches)
    with pytest.raises(ConfigError, match="samples"):
        diagnosed(qmodel, fault, samples=0)
    classes = Faulty(Classes(), fault.batches)
    with pytest.raises(CalibrationError, match="argmax"):
        diagnosed(quantized(classes), classes)


def test_a_healthy_model_has_no_finding_and_is_not_changed():
    torch.manual_seed(0)
    fault = Faulty(Mixer(), list(torch.randn(64, 5, 12).split(16)))
    qmodel = quantized(fault)
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    found = he.diagnose(qmodel, fault.model, fault.batches, evaluate=lambda model: 7.0)
    assert not found.findings
    assert "Nothing needs mending" in found.verdict
    assert found.layer_times
    assert any(note.startswith("The file takes") for note in found.notes)
    assert found.accuracy == {"float": 7.0, "quantized": 7.0}
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())


def test_the_text_is_short_and_the_values_are_plain():
    fault = faulty("scaled_depthwise_channel")
    found = diagnosed(quantized(fault), fault, evaluate=lambda model: 1.0)
    lines = str(found).splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= TEXT_WIDTH
    assert "a scale per channel of this weight" in str(found)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["tensors"][0]["name"] == "2"
    assert values["tensors"][0]["weight"]
    assert found.findings[0].paste == 'rules=(Rule(pattern="2", per_channel=True),)'
    assert values["accuracy"]["repaired"] == 1.0
    assert found.divergence_of_weights > 3 * found.divergence_of_activations
    assert found.divergence_without_quantizers < 1e-6


@pytest.mark.parametrize(("act", "line"), [(nn.ReLU(), 'equalize="on"'), (nn.ReLU6(), 'relu6="per_channel"')])
def test_equalization_is_tried_across_relu6(act, line):
    """It would change nothing in a network whose layers a ReLU6 keeps apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 8, 3, groups=8), act, nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[2].weight[0] *= 50
        model[2].bias.zero_()
    images = torch.randn(8, 3, 12, 12)
    expected = model(images)
    qmodel = he.calibrate(he.prepare(model, images, batchnorm="fold", per_channel=False), [images]).eval()
    remedy = equalization(qmodel)
    assert remedy.paste.endswith(line)
    before = F.mse_loss(qmodel(images), expected)
    remedy.apply(qmodel, [images])
    assert F.mse_loss(qmodel(images), expected) < 0.5 * before


class AtZero(nn.Module):
    """Logarithms and quotients of a tensor that a layer reads too: quantized, small values are 0."""

    def __init__(self, at_zero):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.mid, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.at_zero = at_zero

    def forward(self, x):
        y = F.softplus(6 * self.conv(x))
        return self.at_zero(self.head(F.relu(self.mid(y)).mean((2, 3))), y[:, :3, 2, 2])


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)).split(4))


@pytest.mark.parametrize(
    ("at_zero", "operator"),
    [(lambda z, y: z + y.log(), "log"), pytest.param(lambda z, y: z / y, "div", marks=pytest.mark.exhaustive)],
    ids=["log", "div"],
)
def test_answers_that_quantization_makes_infinite(images, at_zero, operator):
    model = AtZero(at_zero).eval()
    qmodel = he.calibrate(he.prepare(model, images[0], scheme="w4a4"), images)
    assert not all(qmodel(x).isfinite().all() for x in images)
    found = he.diagnose(qmodel, model, images, runtime=False)
    first = found.findings[0]
    assert first.cause == f"{operator} makes NaN or infinity of quantized values"
    assert operator in first.where
    assert "softplus" in first.evidence
    assert "% is 0" in first.evidence
    assert first.recovered > 0.99
    repaired = he.calibrate(he.prepare(model, images[0], scheme="w4a4", rules=first.rules), images)
    assert all(repaired(x).isfinite().all() for x in images)


def test_weights_that_are_not_finite_are_named(images):
    model = AtZero(lambda z, y: z).eval()
    qmodel = he.calibrate(he.prepare(model, images[0]), images)
    with torch.no_grad():
        qmodel.mid.weight[0, 0] = float("nan")
    found = he.diagnose(qmodel, model, images, runtime=False)
    assert [(finding.cause, finding.where) for finding in found.findings] == [
        ("weights are NaN or infinite", "mid.weight")
    ]
    assert found.agreement == 0


def test_answers_that_the_float_model_masks_are_not_compared(images):
    model = AtZero(lambda z, y: z + torch.tensor([0.0, float("-inf"), 0.0])).eval()
    qmodel = he.calibrate(he.prepare(model, images[0]), images)
    damaged = [images[0].clone(), *images[1:]]
    damaged[0][1] = float("nan")
    found = he.diagnose(qmodel, model, damaged, runtime=False)
    assert not found.findings
    assert found.sqnr > 30
    assert any("The float model itself answers NaN, first in batch 0" in note for note in found.notes)
    with pytest.raises(CalibrationError, match="All answers of the float model are NaN or infinite"):
        he.diagnose(qmodel, model, [images[0] * float("nan")], runtime=False)


class Widest:
    """An observer of a user's own."""

    def __init__(self, scheme):
        self.seen = []

    def update(self, values):
        self.seen.append(values.detach().flatten(1))

    def range(self):
        values = torch.cat(self.seen, 1)
        return values.amin(1), values.amax(1)


def test_a_model_with_an_observer_of_ones_own_is_diagnosed_and_has_a_page(tmp_path):
    fault = Faulty(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), [torch.randn(32, 6)])
    found = diagnosed(quantized(fault, rules=(he.Rule(observer=Widest),)), fault)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["tensors"][0]["observer"].endswith("Widest (unversioned)")
    assert "Widest" in page(found._page_contents(), "")
    # Files hold no classes: a model that was loaded is diagnosed all the same.
    few = quantized(fault, scheme="w3a3", rules=(he.Rule(observer=Widest),))
    he.save(few, tmp_path / "model.safetensors")
    loaded = he.load(tmp_path / "model.safetensors", fault.model, fault.batches[0])
    assert diagnosed(loaded, fault).findings
    assert rule_text(vars(he.Rule(observer=Widest))) == 'Rule(pattern="*", observer=Widest)'


def test_a_line_to_paste_is_printed_whole_or_where_it_is_said():
    name = "backbone.stage-2.block-3.attention-branch"
    rules = [he.Rule(pattern=f"{name}.{number}", quantize=False) for number in range(8)]
    finding = Finding(cause="a", where="b", evidence="c", remedy="d", paste=rules_argument(rules[:1]))
    text = str(told([finding]))
    assert f'rules=(Rule(pattern="{name}.0",' in text
    long = dataclasses.replace(finding, paste=rules_argument(rules))
    text = str(told([long] * 3))
    assert "print(diagnosis.findings[2].paste)" in text
    assert name not in text
    crowded = dataclasses.replace(finding, evidence="evidence " * 40, where="layer " * 80)
    text = str(told([crowded] * 3))
    assert "1 more in diagnosis.findings." in text
    assert len(text.splitlines()) <= MAX_LINES


def told(findings):
    numbers = dict.fromkeys(
        ("divergence_without_quantizers", "divergence_of_weights", "divergence_of_activations"), 0.0
    )
    return Diagnosis(
        verdict="v", samples=1, divergence=1.0, sqnr=1.0, error_share=1.0, agreement=None, tensors=(),
        findings=tuple(findings), **numbers,
    )  # fmt: skip


def test_levels_that_no_weight_uses_are_counted_for_each_channel():
    torch.manual_seed(0)
    layer = nn.Linear(64, 2).eval()
    with torch.no_grad():
        layer.weight[1] = layer.weight[1].sign()  # two of its 15 levels
    fault = Faulty(nn.Sequential(layer, nn.ReLU()), [torch.randn(32, 64)])
    (weight,) = [t for t in diagnosed(quantized(fault, scheme="w4a8"), fault).tensors if t.weight]
    assert 0.5 * 13 / 15 <= weight.dead_levels <= 0.7
