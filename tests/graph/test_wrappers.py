"""Wrapped models: torch.compile, DistributedDataParallel and DataParallel around a model or inside of it."""

import threading
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.optim.swa_utils import AveragedModel

import halfeven as he
from halfeven.errors import CalibrationError, CaptureError, ConfigError, PlacementError
from halfeven.graph.copying import copy_model
from halfeven.graph.wrappers import own_forward, unwrapped
from halfeven.layerwise.batches import inputs_in
from halfeven.qat.ema import AveragingOptions, WeightEMA

pytestmark = pytest.mark.usefixtures("unfused")

X = torch.randn(4, 3, 8, 8)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()


@pytest.fixture
def distributed(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def assert_every_verb_works(wrap, tmp_path):
    """Every public verb on a wrapped model does what it does on the model inside."""
    model = net()
    wrapped = wrap(he.prepare(model, X, scheme="w7a8"))
    assert he.calibrate(wrapped, [X]) is wrapped
    qmodel = unwrapped(wrapped).eval()
    assert he.plan_of(wrapped) is he.plan_of(qmodel)
    he.save(wrapped, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", wrap(model), X)
    assert torch.equal(again(X), qmodel(X))
    he.export(wrapped, tmp_path / "m.xml")
    assert he.verify(wrapped, tmp_path / "m.xml", [X], wrap(model), timed=False).integer_match == 1
    assert torch.equal(he.exact(wrapped)(X), he.exact(qmodel)(X))
    assert set(WeightEMA(wrapped, AveragingOptions()).model.state_dict()) == set(qmodel.state_dict())
    assert he.set_rules(wrapped, he.Rule(pattern="3", weight_bits=4))
    assert list(he.quantize(wrap(model), [X]).state_dict()) == list(he.quantize(model, [X]).state_dict())


def test_every_verb_works_on_a_compiled_model(tmp_path):
    assert_every_verb_works(compiled, tmp_path)


def test_distributed_and_compiled(tmp_path, distributed):
    assert_every_verb_works(lambda model: distributed(compiled(model)), tmp_path)


def test_data_parallel_around_distributed(distributed):
    model = net()
    assert unwrapped(nn.DataParallel(distributed(model))) is model
    assert unwrapped(model) is model


def test_an_average_of_weights(tmp_path):
    averaged = AveragedModel(he.calibrate(he.prepare(net(), X), [X]))
    averaged.update_parameters(averaged.module)
    he.save(averaged, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", AveragedModel(net()), X)
    assert torch.equal(again(X), averaged.eval()(X))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, left, right):
        return self.layer(left + right)


def test_inputs_of_a_wrapped_model_are_those_of_the_model():
    batch = (torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    assert [len(inputs_in(wrap(Two()), batch)[0]) for wrap in (nn.DataParallel, compiled)] == [2, 2]


def test_compiled_parts_of_the_float_model():
    model = net()
    plain = he.prepare(model, X)
    nested = nn.Sequential(compiled(nn.Sequential(compiled(net()[0]), net()[1:]))).eval()
    model[0] = compiled(model[0])
    assert list(he.prepare(model, X).state_dict()) == list(plain.state_dict())
    assert set(he.prepare(nested, X).state_dict()) >= {"0.0.weight", "0.1.3.weight"}
    assert type(model[0]) is not nn.Conv2d  # the float model is not changed


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight", "spectral"])
def test_an_older_normalization_after_a_step(make, tmp_path):
    model = nn.Sequential(make(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).train()
    model(X).sum().backward()
    model.eval()
    qmodel = he.calibrate(he.prepare(model, X), [X]).train()
    qmodel(X).sum().backward()
    assert qmodel.get_parameter(f"0.weight_{'g' if make is nn.utils.weight_norm else 'orig'}").grad is not None
    qmodel.eval()
    he.save(qmodel, tmp_path / "m.safetensors")
    assert torch.equal(he.load(tmp_path / "m.safetensors", model, X)(X), qmodel(X))
    model.train()(X).sum().backward()  # the float model still trains


class Keeps(nn.Module):
    """Keeps what its last forward pass computed."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        self.kept = {"features": [self.fc(x)]}
        return self.kept["features"][0]


def test_a_model_that_keeps_its_features_is_copied():
    model = Keeps()
    model(torch.randn(2, 4))
    copied = copy_model(model)
    assert copied.kept["features"][0].grad_fn is None
    assert model.kept["features"][0].grad_fn is not None
    he.prepare(model.eval(), torch.randn(2, 4))


def test_what_cannot_be_copied_is_an_error_of_ours():
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"cannot be copied.*lock"):
        he.prepare(model, X)


def test_a_quantized_model_is_not_quantized_again():
    qmodel = he.prepare(net(), X)
    for verb in (he.prepare, he.plan, lambda model, x: he.quantize(model, [x])):
        for model in (qmodel, compiled(qmodel), nn.Sequential(qmodel, nn.Linear(2, 2))):
            with pytest.raises(ConfigError, match="quantized already"):
                verb(model, X)


def test_a_float_model_has_nothing_to_calibrate():
    with pytest.raises(CalibrationError, match=r"This Sequential has no quantizers.*prepare"):
        he.calibrate(compiled(net()), [X])
    with pytest.raises(PlacementError, match="This Sequential has no plan"):
        he.plan_of(compiled(net()))


def test_models_without_code_or_values_are_refused():
    with pytest.raises(CaptureError, match=r"TorchScript.*: the model itself, 0, .*Give the Python model"):
        he.prepare(torch.jit.trace(net(), X), X)
    with pytest.raises(CaptureError, match=r"meta device have no values.*: 0\.weight, 0\.bias.*Load the weights first"):
        he.prepare(net().to("meta"), X)


def test_mixed_precision_around_every_verb_changes_no_file(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        qmodel = he.calibrate(he.prepare(net(), X, scheme="w7a8"), [X]).eval()
        path = he.export(qmodel, tmp_path / "model.xml")
        assert he.verify(qmodel, path, [X], timed=False).integer_match == 1.0
        computed = he.exact(qmodel)(X)
    assert torch.equal(computed, he.load_deployed(path)(X))
    assert he.verify(qmodel, path, [X], timed=False).integer_match == 1.0


def in_bfloat16(model):
    """What Accelerate's `prepare` does with mixed precision."""
    forward = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model._original_forward = model.forward
    model.forward = MethodType(convert_outputs_to_fp32(forward), model)
    return model


def test_the_mixed_precision_of_accelerate_stays_in_the_training(tmp_path):
    """It is around the forward of the model itself, which `verify` would take for the simulation."""
    torch.manual_seed(0)
    model = net()
    qmodel = he.calibrate(he.prepare(model, X, scheme="w7a8"), [X]).eval()
    path, expected = he.export(qmodel, tmp_path / "model.xml"), qmodel(X)
    assert not torch.equal(in_bfloat16(qmodel)(X), expected)
    with own_forward(qmodel):
        assert torch.equal(qmodel(X), expected)
    assert not torch.equal(qmodel(X), expected), "the training goes on in it"
    assert torch.equal(copy_model(qmodel)(X), expected)
    report = he.verify(qmodel, path, [X], timed=False)
    assert (report.integer_match, report.findings) == (1.0, [])
    assert report.float_simulation_match > 0.99, "86 % in bfloat16"
    plain = he.quantize(model, [X], scheme="w7a8")
    assert torch.equal(he.quantize(in_bfloat16(model), [X], scheme="w7a8")(X), plain(X))
