"""Weights under timm's, torchvision's and OpenMMLab's names give the same outputs; anything else is refused."""

import copy
import pickle
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from halfeven.errors import CheckpointError, HalfevenWarning
from halfeven.zoo.weights import key_differences, load_weights, read_weights


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained_like(model):
    """A model whose statistics are not the initial ones, so that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.05)
    return model.eval()


def as_openmmlab_resnet(state):
    return OrderedDict((f"head.{k}" if k.startswith("fc.") else f"backbone.{k}", v) for k, v in state.items())


def as_openmmlab_mobilenet(state):
    """torchvision's MobileNetV2 in OpenMMLab's names, written out by position as mmpretrain's class nests them."""
    stages = [(stage + 1, block) for stage, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(n)]
    result = OrderedDict()
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "classifier":
            result[f"head.fc.{parts[-1]}"] = value
        elif parts[1] in ("0", "18"):
            conv = "conv1" if parts[1] == "0" else "conv2"
            result[f"backbone.{conv}.{'conv' if parts[2] == '0' else 'bn'}.{parts[-1]}"] = value
        else:
            stage, block = stages[int(parts[1]) - 1]
            if len(parts) == 6:  # features.N.conv.I.{0,1}.leaf: convolution, BatchNorm and ReLU6 together
                position, kind = parts[3], ("conv", "bn")[int(parts[4])]
            else:  # features.N.conv.I.leaf: the linear projection and its BatchNorm
                first = 1 if stage == 1 else 2
                position, kind = str(first), "conv" if int(parts[3]) == first else "bn"
            result[f"backbone.layer{stage}.{block}.conv.{position}.{kind}.{parts[-1]}"] = value
    return result


def test_torchvision_mobilenet_in_timm(tmp_path, images):
    source = trained_like(torchvision.models.mobilenet_v2(num_classes=7))
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "m.pth")
    model = timm.create_model("mobilenetv2_100", num_classes=7).eval()
    load_weights(model, tmp_path / "m.pth")
    torch.testing.assert_close(model(images), source(images))


def test_timm_mobilenet_in_torchvision(tmp_path, images):
    source = trained_like(timm.create_model("mobilenetv2_100", num_classes=7))
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    model = torchvision.models.mobilenet_v2(num_classes=7).eval()
    load_weights(model, tmp_path / "m.safetensors")
    torch.testing.assert_close(model(images), source(images))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_weights_of_openmmlabs_resnet_load(tmp_path, images, library):
    source = trained_like(torchvision.models.resnet18(num_classes=7))
    meta = {"epoch": 100, "CLASSES": ("a", "b"), "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": as_openmmlab_resnet(source.state_dict())}, tmp_path / "m.pth")
    make = {"timm": timm.create_model, "torchvision": torchvision.models.get_model}[library]
    model = make("resnet18", num_classes=7).eval()
    load_weights(model, tmp_path / "m.pth")
    torch.testing.assert_close(model(images), source(images))


def test_weights_of_openmmlabs_mobilenet_load(tmp_path, images):
    source = trained_like(torchvision.models.mobilenet_v2(num_classes=7))
    torch.save({"state_dict": as_openmmlab_mobilenet(source.state_dict())}, tmp_path / "m.pth")
    for model in (timm.create_model("mobilenetv2_100", num_classes=7), torchvision.models.mobilenet_v2(num_classes=7)):
        load_weights(model.eval(), tmp_path / "m.pth")
        torch.testing.assert_close(model(images), source(images))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)


class Module(nn.Module):
    """A training module that holds the network under a name of its own."""

    def __init__(self, model):
        super().__init__()
        self.network = model


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average


def compiled_inside(model):
    model = copy.deepcopy(model)
    model.conv = torch.compile(model.conv)
    return model


WRAPPED = {
    "compile(DDP)": lambda m: torch.compile(nn.DataParallel(m)).state_dict(),
    "DDP(compile)": lambda m: nn.DataParallel(torch.compile(m)).state_dict(),
    "DDP(average(compile))": lambda m: nn.DataParallel(averaged(torch.compile(m))).state_dict(),
    "a compiled layer": lambda m: compiled_inside(m).state_dict(),
    "Lightning": lambda m: {"state_dict": Module(torch.compile(m)).state_dict(), "epoch": 3},
    "Lightning, of a DDP model": lambda m: {"state_dict": {f"model.{k}": v for k, v in wrapped(m).items()}},
    "an average's entry": lambda m: {"ema": {"module": m.state_dict(), "updates": 4}, "optimizer": {}},
    "a prefix twice": lambda m: {"ema": {f"ema.module.module.{k}": v for k, v in m.state_dict().items()}},
    "torch's tutorial": lambda m: {"model_state_dict": wrapped(m), "loss": 0.5},
}


def wrapped(model):
    return nn.DataParallel(model).state_dict()


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_of_wrapped_models_load(tmp_path, name):
    source = trained_like(Tiny())
    file = tmp_path / ("m.ckpt" if "Lightning" in name else "m.pth")
    torch.save(WRAPPED[name](source), file)
    model = Tiny()
    load_weights(model, file)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_wrapped_module_of_the_models_own_stays(tmp_path):
    source = trained_like(Module(Module(Tiny())))
    torch.save(torch.compile(nn.DataParallel(source)).state_dict(), tmp_path / "m.pth")
    model = Module(Module(Tiny()))
    load_weights(model, tmp_path / "m.pth")
    assert torch.equal(model.network.network.conv.weight, source.network.network.conv.weight)


def test_a_network_beside_a_loss_with_weights_is_found(tmp_path):
    source = trained_like(Tiny())
    state = {f"network.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(2)}}, tmp_path / "m.ckpt")
    model = Tiny()
    with pytest.warns(HalfevenWarning, match=r"beside those of the model, which were left out: loss\.weight"):
        load_weights(model, tmp_path / "m.ckpt")
    assert torch.equal(model.conv.weight, source.conv.weight)


def test_of_two_sets_of_weights_in_a_state_dict_none_is_taken(tmp_path):
    state = trained_like(Tiny()).state_dict()
    both = {f"{part}.{key}": value for part in ("model", "ema") for key, value in state.items()}
    torch.save({"state_dict": both}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"model\.conv\.weight"):
        load_weights(Tiny(), tmp_path / "m.pth")


def test_old_checkpoint_without_batch_counters(tmp_path):
    source = trained_like(torchvision.models.resnet18(num_classes=2))
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "m.pth")
    model = torchvision.models.resnet18(num_classes=2)
    load_weights(model, tmp_path / "m.pth")
    assert torch.equal(model.bn1.running_var, source.bn1.running_var)


def test_other_head_is_refused_and_named(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "m.pth")
    model = torchvision.models.resnet18(num_classes=10)
    before = model.conv1.weight.clone()
    with pytest.raises(CheckpointError, match=r"another shape \(2\): fc.weight \(5, 512\) instead of \(10, 512\)"):
        load_weights(model, tmp_path / "m.pth")
    assert torch.equal(model.conv1.weight, before), "a refused file must not be loaded in part"


def test_missing_and_unexpected_are_listed():
    one, two = torch.zeros(1), torch.zeros(2)
    assert key_differences({"a": one, "b": one}, {"a": two, "c": one}).splitlines() == [
        "  missing (1): c",
        "  unexpected (1): b",
        "  another shape (1): a (1,) instead of (2,)",
    ]
    assert key_differences({"a": one}, {"a": one}) == ""


class Bomb:
    """Unpickling this would run code."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_never_run(tmp_path):
    bomb = Bomb(str(tmp_path / "code-ran"))
    torch.save({"state_dict": {"w": torch.zeros(1)}, "meta": bomb}, tmp_path / "m.pth")
    with pytest.warns(UserWarning, match="would run code"):
        assert read_weights(tmp_path / "m.pth").keys() == {"w"}
    (tmp_path / "n.pt").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="never does"):
        read_weights(tmp_path / "n.pt")
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "no weights file"),
        ("weights.bin2", b"", "its format is not known"),
        ("cut.pth", b"PK\x03\x04", "is damaged: its end is missing"),
        ("cut.pt", b"\x80\x02", "cannot be read as tensors"),
        ("cut.safetensors", b"\x09\x00", "not a whole safetensors file"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


def test_file_without_state_dict(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="no state_dict"):
        read_weights(tmp_path / "m.pth")
