"""prepare, quantize and load: the ways to a quantized model."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError, CaptureError, ConfigError
from halfeven.quantization.model_quantizers import quantizers
from runtimes.parity import SCHEME

IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(x).mean((2, 3)))


def loader(count=3):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(IMAGE, generator=generator), torch.zeros(2, dtype=torch.long)) for _ in range(count)]


def test_prepare_leaves_the_float_model_alone():
    model = Net().train()
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    qmodel = he.prepare(model, torch.randn(IMAGE))
    he.calibrate(qmodel, loader())
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.zero_()
    assert [name for name, _ in model.named_modules()] == names
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_prepare_keeps_the_mode(training):
    assert he.prepare(Net().train(training), torch.randn(IMAGE)).training is training


def test_prepare_takes_options_and_changes_to_them():
    options = he.QuantizationOptions(scheme="w4a8", ranges="learned")
    plan = he.plan_of(he.prepare(Net(), torch.randn(IMAGE), options, scheme="w6a6"))
    assert plan.options == he.QuantizationOptions(scheme="w6a6", ranges="learned", batchnorm="keep")
    assert options.scheme == "w4a8"
    assert {w.scheme.bits for w in plan.weights} == {6}


def test_an_option_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConfigError, match=r"per_chanel.*per_channel"):
        he.prepare(Net(), torch.randn(IMAGE), per_chanel=False)


def test_the_quantized_model_trains_like_any_module():
    qmodel = he.prepare(Net(), torch.randn(IMAGE), ranges="learned")
    he.calibrate(qmodel, loader())
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    optimizer = torch.optim.Adam(qmodel.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qmodel.train()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_training_without_calibration_is_an_error():
    qmodel = he.prepare(Net(), torch.randn(IMAGE), ranges="learned")
    with pytest.raises(CalibrationError, match="calibrate"):
        qmodel.train()(torch.randn(IMAGE))


def test_batchnorm_is_kept_or_folded():
    kept = he.prepare(Net(), torch.randn(IMAGE))
    folded = he.prepare(Net(), torch.randn(IMAGE), batchnorm="fold")
    assert isinstance(kept.norm, nn.BatchNorm2d)
    assert "norm.weight" not in folded.state_dict()
    assert "conv.bias" in folded.state_dict()


def test_8_bits_are_close_to_float():
    model = Net().eval()
    model.norm.running_var.fill_(0.3)
    qmodel = he.quantize(model, loader())
    x = torch.randn(32, 3, 8, 8)
    expected = model(x)
    noise = (qmodel(x) - expected).square().mean() / expected.var()
    assert 1e-9 < noise < 2e-3


def test_quantize_without_its_steps_is_prepare_and_calibrate():
    model = Net().eval()
    one = he.quantize(model, loader(), scheme="w4a8", batches=2, reconstruct="off", correct_biases="off")
    other = he.prepare(model, loader()[0][0], scheme="w4a8", batchnorm="fold", ranges="observed")
    he.calibrate(other, loader(), batches=2)
    assert not one.training
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert he.plan_of(one) == he.plan_of(other)


def test_quantize_takes_dicts_and_the_file_is_verified_with_them(tmp_path):
    class Keyword(Net):
        def forward(self, pixels):
            return {"logits": super().forward(pixels)}

    batches = [{"pixels": x, "labels": y} for x, y in loader()]
    qmodel = he.quantize(Keyword().eval(), batches, scheme=SCHEME)
    assert qmodel(pixels=torch.randn(IMAGE))["logits"].shape == (2, 4)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1


def test_options_of_trained_scales_do_not_hinder_quantization_after_training():
    options = he.QuantizationOptions(gradient_scale="off")
    assert he.plan_of(he.quantize(Net().eval(), loader(), options)).options.ranges == "observed"


def test_quantize_of_no_batches_is_an_error():
    with pytest.raises(CalibrationError, match="no batch"):
        he.quantize(Net(), [])


@pytest.mark.parametrize(
    "options", [{}, {"ranges": "learned", "scheme": "w4a8"}, {"batchnorm": "fold"}, {"leave_out": ("fc",)}]
)
def test_save_and_load(options, tmp_path):
    model = Net().eval()
    qmodel = he.quantize(model, loader(), **options)
    he.save(qmodel, tmp_path / "q.safetensors")
    other = Net()  # another float model: its weights come from the file
    loaded = he.load(tmp_path / "q.safetensors", other, torch.randn(IMAGE))
    x = torch.randn(5, 3, 8, 8)
    assert not loaded.training
    assert torch.equal(loaded(x), qmodel(x))
    assert he.plan_of(loaded) == he.plan_of(qmodel)
    assert not torch.equal(other.fc.weight, loaded.state_dict()["fc.weight"])
    assert all(q.state.has_range for q in quantizers(loaded).values())
    he.export(loaded, tmp_path / "model.onnx")


def test_the_example_that_is_kept_is_small_and_on_the_cpu():
    qmodel = he.prepare(Net(), torch.randn(16, 3, 8, 8))
    args, kwargs = qmodel.halfeven_example
    assert [tuple(x.shape) for x in args] == [(2, 3, 8, 8)]
    assert kwargs == {}


def test_what_cannot_be_captured_is_said_in_the_plan():
    class Branching(Net):
        def forward(self, x):
            return super().forward(x) if x.mean() > 100 else super().forward(-x)

    qmodel = he.prepare(Branching(), torch.randn(IMAGE))
    text = " ".join(str(he.plan_of(qmodel)).split())
    assert "Stays Python, in float: (the model itself)" in text
    assert "x.mean() > 100" in text
    he.calibrate(qmodel, loader())
    assert qmodel(torch.randn(IMAGE)).shape == (2, 4)


def test_an_example_that_does_not_run_is_an_error():
    with pytest.raises(CaptureError, match="does not run on the example"):
        he.prepare(Net(), torch.randn(2, 4, 8, 8))


def test_the_model_compiles_whole():
    qmodel = he.quantize(Net().eval(), loader())
    x = torch.randn(IMAGE)
    compiled = torch.compile(qmodel, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), qmodel(x))


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer(x).relu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_quantized_in_float32(dtype, tmp_path):
    model = Half().eval().to(dtype)
    x = torch.randn(4, 8)
    qmodel = he.calibrate(he.prepare(model, {"x": x.to(dtype)}, scheme="w7a8"), [{"x": x}])
    assert model.head.weight.dtype == dtype
    assert "quantized in float32" in str(he.plan_of(qmodel).notes)
    he.save(qmodel, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", model, {"x": x.to(dtype)})
    he.export(again, tmp_path / "m.onnx", target="onnxruntime")
    assert torch.allclose(he.load_deployed(tmp_path / "m.onnx", "onnxruntime")(x), again(x), atol=0.1)
