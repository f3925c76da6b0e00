"""Reconstruction gains, keeps to the grid, stays as it was decided, and goes on after an interruption."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import AlgorithmError, CalibrationError, CheckpointError, HalfevenWarning
from halfeven.layerwise.float_equivalence import float_function
from halfeven.layerwise.sqnr import sqnr
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction import reconstruct as reconstructing
from halfeven.ptq.reconstruction.optimize import optimize_block
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.quantization.arithmetic import quantize
from halfeven.quantization.model_quantizers import quantizers
from nets import Halves

OPTIONS = PTQOptions(iterations=100, batch_size=16, rounding_rate=0.05)
QUICK = dataclasses.replace(OPTIONS, iterations=8)
"""Where what is learned need not be better."""


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.conv2, self.fc = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def images(count=128, seed=1):
    low = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(low, size=(8, 8), mode="bilinear")  # neighbours are alike, as in photographs


@functools.cache
def calibrated_once(scheme, net):
    torch.manual_seed(0)
    qmodel = he.prepare(net().eval(), images(2), scheme=scheme, batchnorm="fold")
    return he.calibrate(qmodel, images().split(16)).eval()


def calibrated(scheme="w4a8", net=Net):
    return copy.deepcopy(calibrated_once(scheme, net))


def float_reference(scheme):
    qmodel = calibrated(scheme)
    with torch.no_grad(), float_function(qmodel):
        return qmodel(images(64, seed=2))


@pytest.mark.parametrize(("algorithm", "scheme"), [(adaround, "w4a8"), (reconstruct, "w4a8"), (reconstruct, "w4a4")])
def test_it_gains_on_images_that_it_has_not_seen(algorithm, scheme):
    wanted = float_reference(scheme)
    qmodel = calibrated(scheme)
    x = images(64, seed=2)
    with torch.no_grad():
        before = sqnr([qmodel(x)], [wanted])
        report = algorithm(qmodel, images().split(16), options=OPTIONS)
        after = sqnr([qmodel(x)], [wanted])
    assert after > before + 0.5, report
    assert all(block.after >= block.before for block in report.blocks)
    assert "SQNR" in str(report)


def test_weights_lie_on_their_grids_and_a_later_calibration_leaves_them():
    qmodel = calibrated()
    adaround(qmodel, images().split(16), options=QUICK)
    weights = {name: p.detach().clone() for name, p in qmodel.named_parameters()}
    he.calibrate(qmodel, images(seed=3).split(16))
    for name, module in qmodel.named_modules():
        if hasattr(module, "weight_quantizer"):
            quantizer = module.weight_quantizer
            integers = quantize(module.weight, quantizer.scale, quantizer.zero_point, quantizer.scheme)
            assert integers.abs().max() <= 7
            assert torch.equal(quantizer(module.weight), module.weight), name
            assert torch.equal(module.weight, weights[f"{name}.weight"])


def test_a_loaded_checkpoint_keeps_its_rounding_too(tmp_path):
    qmodel = calibrated()
    adaround(qmodel, images().split(16), options=QUICK)
    he.save(qmodel, tmp_path / "q.safetensors")
    loaded = he.load(tmp_path / "q.safetensors", Net(), images(2))
    he.calibrate(loaded, images(seed=3).split(16))
    for name, parameter in qmodel.named_parameters():
        activation = name.startswith("quantizers.")  # whose ranges are those of the other images now
        assert activation or torch.equal(loaded.get_parameter(name), parameter)
    x = images(8, seed=4)
    weights = [m for m in loaded.modules() if hasattr(m, "weight_quantizer")]
    assert all(torch.equal(m.weight_quantizer(m.weight), m.weight) for m in weights)
    assert loaded(x).isfinite().all()


def test_adaround_learns_the_rounding_alone():
    qmodel, other = calibrated(), calibrated()
    adaround(qmodel, images().split(16), options=QUICK)
    for name, quantizer in quantizers(qmodel).items():
        assert torch.equal(quantizer.scale, quantizers(other)[name].scale)
    for name, parameter in other.named_parameters():
        found = qmodel.get_parameter(name)
        if name.endswith("bias"):
            assert torch.equal(found, parameter)
        elif name.endswith("weight"):
            scale = other.get_submodule(name.rpartition(".")[0]).weight_quantizer.used_scale(parameter)
            steps = (found - parameter).abs() / scale.reshape(-1, *[1] * (parameter.ndim - 1))
            assert steps[parameter.abs() < 7 * scale.reshape(-1, *[1] * (parameter.ndim - 1))].max() < 1


def test_the_model_comes_back_as_it_was_but_for_what_was_learned():
    qmodel = calibrated().train()
    asked = {name: p.requires_grad for name, p in qmodel.named_parameters()}
    reconstruct(qmodel, images().split(16), options=QUICK)
    assert all(module.training for module in qmodel.modules())
    assert asked == {name: p.requires_grad for name, p in qmodel.named_parameters()}
    qmodel(images(4)).sum().backward()


@pytest.mark.parametrize(
    "options", [{"learn_weight_scales": True}, {"drop": 0.0}, {"bias_rate": 1e-3}, {"memory": 1e-6}]
)
def test_each_option_of_the_reconstruction_works(options):
    qmodel = calibrated("w4a4")
    report = reconstruct(qmodel, images().split(16), options=dataclasses.replace(OPTIONS, **options))
    assert report.blocks[0].after > report.blocks[0].before
    assert (report.bytes_on_disk > 0) == ("memory" in options)


def test_it_is_the_same_every_time_whatever_the_memory():
    runs = []
    for memory in (4.0, 4.0, 1e-6):
        qmodel = calibrated("w4a4")
        reconstruct(qmodel, images().split(16), options=dataclasses.replace(QUICK, memory=memory))
        runs.append(qmodel.state_dict())
    assert all(torch.equal(runs[0][key], other[key]) for other in runs[1:] for key in runs[0])


@pytest.mark.parametrize("algorithm", [adaround, reconstruct])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(algorithm, tmp_path):
    whole = calibrated("w4a4")
    algorithm(whole, images().split(16), options=QUICK)
    killed = []

    def kill(text):
        killed.append(text)
        if len(killed) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        algorithm(calibrated("w4a4"), images().split(16), options=QUICK, resume_dir=tmp_path / "state", log=kill)
    resumed, said = calibrated("w4a4"), []
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "state").glob("*.safetensors")}
    assert len(times) == 2
    report = algorithm(resumed, images().split(16), options=QUICK, resume_dir=tmp_path / "state", log=said.append)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items()), "finished blocks were learned again"
    assert len(said) == len(report.blocks) > 2
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    he.calibrate(resumed, images(seed=3).split(16))
    assert torch.equal(resumed.get_parameter("stem.weight"), whole.get_parameter("stem.weight"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder with the state of a reconstruction."""
    folder = tmp_path_factory.mktemp("state")
    reconstruct(calibrated(), images().split(16), options=QUICK, resume_dir=folder)
    return folder


@pytest.mark.parametrize("change", ["options", "images", "weights"])
def test_the_state_of_another_run_is_refused(change, finished):
    qmodel, options, x = calibrated(), QUICK, images()
    if change == "options":
        options = dataclasses.replace(QUICK, seed=1)
    elif change == "images":
        x = images(seed=9)
    else:
        qmodel.get_parameter("fc.weight").data[0, 0] += 1
    with pytest.raises(CheckpointError, match="another reconstruction"):
        reconstruct(qmodel, x.split(16), options=options, resume_dir=finished)


def test_a_rounding_is_learned_once():
    qmodel = calibrated()
    adaround(qmodel, images().split(16), options=QUICK)
    with pytest.raises(AlgorithmError, match="float weights"):
        reconstruct(qmodel, images().split(16), options=QUICK)


def test_ranges_must_be_set():
    qmodel = he.prepare(Net().eval(), images(2))
    with pytest.raises(CalibrationError, match="no range yet"):
        reconstruct(qmodel, images().split(16), options=QUICK)


def test_the_deployed_file_holds_the_learned_rounding(tmp_path):
    qmodel = calibrated()
    reconstruct(qmodel, images().split(16), options=QUICK)
    path = he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, path, images(32, seed=2).split(16), timed=False)
    assert report.integer_match == 1
    assert report.weights_match
    assert report.integer_layers == report.quantizable_layers == 4


class Twice(nn.Module):
    """One convolution at two places."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(F.relu(self.conv(x))))
        return self.last(x)


def test_a_layer_that_is_used_twice_is_decided_once():
    qmodel = calibrated("w4a8", Twice)
    report = adaround(qmodel, images().split(16), options=QUICK)
    weight, quantizer = qmodel.conv.weight, qmodel.conv.weight_quantizer
    assert torch.equal(quantizer(weight), weight)
    assert len(report.blocks) == 4


@pytest.mark.parametrize("net", [Twice, Halves])
def test_the_target_of_a_later_call_and_of_a_later_region_is_the_float_models(monkeypatch, net):
    qmodel = calibrated("w4a8", net)
    x = images(16)
    with torch.no_grad(), float_function(qmodel):
        wanted = qmodel(x)
    targets = []

    def seen(block, floats, quantized, options, seed):
        targets.append(list(floats.outputs(block, 0).values()))
        return optimize_block(block, floats, quantized, options, seed)

    monkeypatch.setattr(reconstructing, "optimize_block", seen)
    options = dataclasses.replace(QUICK, bias_rate=0.1)
    reconstructing._reconstruct(qmodel, [x], "layers", options, None, None, None)
    torch.testing.assert_close(targets[-1], [wanted])


def test_the_regularizer_takes_part_however_long_the_warm_start_is():
    options = dataclasses.replace(QUICK, iterations=4, warm_start=0.9)
    assert adaround(calibrated(), [images(16)], options=options).iterations == 4


class Heads(nn.Module):
    """A head that reads two levels, with a BatchNorm of each level's own, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        levels = (x, nn.functional.max_pool2d(x, 2))
        return [self.last(torch.relu(norm(self.head(y)))) for norm, y in zip(self.norms, levels, strict=True)]


@pytest.mark.parametrize("learn", [adaround, reconstruct])
def test_a_head_that_is_called_twice_is_kept_once_for_each_call(learn, tmp_path):
    batches = list(images(16, seed=1).split(8))
    qmodel = he.calibrate(he.prepare(Heads().eval(), batches[0], scheme="w4a8", batchnorm="fold"), batches)
    report = learn(qmodel, batches, options=PTQOptions(iterations=4), resume_dir=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(report.blocks)


class Scaled(nn.Module):
    """Kept in Python, since it does something else in training."""

    def forward(self, x, *, factor):
        return x * factor + (torch.randn_like(x) if self.training else 0.0)


class WithKeyword(Net):
    def __init__(self):
        super().__init__()
        self.scaled = Scaled()

    def forward(self, x):
        return super().forward(self.scaled(x, factor=2.0))


def test_a_module_in_python_may_be_called_by_keywords():
    qmodel = calibrated(net=WithKeyword)
    assert qmodel.graph.find_nodes(op="call_module", target="scaled")[0].kwargs == {"factor": 2.0}
    report = adaround(qmodel, images().split(16), options=QUICK)
    assert all(block.before > 10 for block in report.blocks)


class WithFunctions(Net):
    """A weight that is computed, and a weight that a function reads."""

    def __init__(self):
        super().__init__()
        self.free = nn.Parameter(self.fc.weight.detach().clone())

    def forward(self, x):
        stem = self.stem.weight - self.stem.weight.mean((1, 2, 3), keepdim=True)
        x = F.relu(F.conv2d(x, stem, self.stem.bias, padding=1))
        return F.linear(self.conv2(F.relu(self.conv1(x))).mean((2, 3)), self.free)


def test_weights_without_a_module_are_named_in_the_report():
    qmodel, lines = calibrated(net=WithFunctions), []
    report = reconstruct(qmodel, images().split(16), options=QUICK, log=lines.append)
    assert report.nearest == ("the weight of conv2d", "the weight of linear")
    assert "2 weights keep rounding to nearest" in str(report)
    assert "2 weights keep rounding to nearest" in lines[-1]
    with pytest.warns(HalfevenWarning, match=r"the weight of conv2d, the weight of linear\."):
        adaround(calibrated(net=WithFunctions), images().split(16), options=QUICK)
