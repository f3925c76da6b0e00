"""The whole way: he.quantize in its steps, with data and without."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.decision import Decision
from halfeven.errors import CalibrationError, ConfigError
from halfeven.layerwise.outputs import float_outputs, quantized_outputs
from halfeven.layerwise.sqnr import sqnr
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.pipeline import STEPS, StepContext, enabled_step, run_steps
from halfeven.ptq.recipe import DECISIONS, decide
from nets import uneven
from runtimes.parity import SCHEME


class Mobile(nn.Module):
    """Two inverted residuals with BatchNorm and ReLU6."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project, self.norm3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.norm(self.stem(x)))
        x = x + self.norm3(self.project(F.relu6(self.norm2(self.depthwise(x)))))
        return self.fc(x.mean((2, 3)))


def model():
    torch.manual_seed(0)
    return uneven(Mobile())


def batches(seed=1, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.zeros(16)) for _ in range(count)]


@torch.no_grad()
def quality(qmodel):
    found = [qmodel(x) for x, _ in batches(9)]
    return sqnr(found, [model()(x) for x, _ in batches(9)])


QUICK = {"iterations": 40, "batch_size": 16}


def test_equalization_saves_per_tensor_weights():
    said = []
    plain = he.quantize(model(), batches(), per_channel=False, equalize="off", correct_biases="off")
    full = he.quantize(model(), batches(), per_channel=False, log=said.append)
    assert quality(full) > quality(plain) + 4
    text = "\n".join(said)
    for step in ("Steps of post-training quantization", "passing ReLU6", "Equalization", "absorption", "SQNR"):
        assert step in text


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_low_bits_are_reconstructed(scheme):
    said = []
    plain = he.quantize(model(), batches(), scheme=scheme, reconstruct="off", correct_biases="off")
    full = he.quantize(model(), batches(), scheme=scheme, log=said.append, **QUICK)
    assert quality(full) > quality(plain)
    assert any("SQNR" in line and "stem" in line for line in said)


def test_layers_then_bias_correction():
    qmodel = he.quantize(model(), batches(), scheme="w4a8", reconstruct="layers", correct_biases="on", **QUICK)
    assert quality(qmodel) > 5


def test_without_data_it_works_and_says_what_it_gave_up():
    said = []
    qmodel = he.quantize(model(), example=batches()[0][0], log=said.append, per_channel=False)
    assert quality(qmodel) > 2
    assert "No data was given" in said[-1]


def test_it_is_saved_loaded_and_deployed(tmp_path):
    qmodel = he.quantize(model(), batches(), scheme=SCHEME, per_channel=False, relu6="replace", correct_biases="on")
    assert he.plan_of(qmodel).changes.unclipped
    he.save(qmodel, tmp_path / "q.safetensors")
    x = batches(5)[0][0]
    loaded = he.load(tmp_path / "q.safetensors", model(), x)
    assert torch.equal(loaded(x), qmodel(x))
    report = he.verify(loaded, he.export(loaded, tmp_path / "m.xml"), [x], timed=False)
    assert report.integer_match == 1


def test_an_undone_bias_correction_leaves_the_model_as_calibration_made_it():
    said = []
    qmodel = he.quantize(model(), batches(), per_channel=False, log=said.append)
    off = he.quantize(model(), batches(), per_channel=False, correct_biases="off")
    undone = "undone" in said[-1]
    same = all(torch.equal(a, b) for a, b in zip(qmodel.parameters(), off.parameters(), strict=True))
    assert same == undone
    assert quality(qmodel) >= quality(off) - 0.5


def test_the_float_model_is_not_touched():
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    he.quantize(net, batches(), scheme="w4a4", per_channel=False, **QUICK)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_quantize_refuses_bad_arguments():
    with pytest.raises(ConfigError, match="example"):
        he.quantize(model())
    with pytest.raises(CalibrationError, match="no batch"):
        he.quantize(model(), [])
    with pytest.raises(ConfigError, match="Did you mean iterations"):
        he.quantize(model(), batches(), iteration=3)
    with pytest.raises(ConfigError, match=r"PTQOptions\.drop=1"):
        he.quantize(model(), batches(), drop=1.0)


@pytest.mark.parametrize("batchnorm", ["keep", "fold live"])
def test_batchnorm_that_stays_live_is_refused_and_not_folded(batchnorm):
    with pytest.raises(ConfigError, match=f'batchnorm="{batchnorm}" keeps BatchNorm for training'):
        he.quantize(model(), batches(), batchnorm=batchnorm)
    with pytest.raises(ConfigError, match='Set batchnorm="fold"'):
        he.quantize(model(), batches(), he.QuantizationOptions(batchnorm=batchnorm))


def halve_weights(context):
    with torch.no_grad():
        for parameter in context.qmodel.parameters():
            parameter.mul_(0.5)
    context.log("Halved.")


@pytest.mark.parametrize("enabled", [True, False])
def test_an_algorithm_is_a_step_and_a_line_of_the_recipe(enabled):
    """One that halves all weights before calibration, decided from the bits."""
    qmodel = he.prepare(model(), batches()[0][0], batchnorm="fold").eval()
    inputs = [x for x, _ in batches()]
    before = float_outputs(qmodel, inputs)
    decisions = DECISIONS | {"halving": lambda situation, earlier: Decision(enabled, f"{situation.weight_bits} bits")}
    recipe = decide(qmodel, PTQOptions(), data=True, decisions=decisions)
    assert str(recipe).splitlines()[-1].split() == ["halving", "yes" if enabled else "no", "8", "bits"]
    said = []
    place = [step.name for step in STEPS].index("calibration")
    steps = (*STEPS[:place], enabled_step("halving", halve_weights), *STEPS[place:])
    context = StepContext(qmodel=qmodel, batches=inputs, recipe=recipe, options=PTQOptions(), log=said.append)
    quantized = run_steps(context, steps)
    assert ("Halved." in said) == enabled
    after = float_outputs(quantized, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) != enabled
    assert sqnr(quantized_outputs(quantized, inputs), after) > 20  # calibrated after the halving


def test_every_line_of_the_recipe_has_its_step():
    assert set(DECISIONS) <= {step.name for step in STEPS}
