"""A changed checkpoint, state or weights file is refused with a message, or gives the same numbers."""

import collections
import copy
import json
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from halfeven.checkpoint import read_facts, restore, save, save_weights
from halfeven.errors import CheckpointError, HalfevenError
from halfeven.integrity import FACTS_DIGEST, TENSORS_DIGEST
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import prepare, rebuild
from halfeven.training.state import TrainingState, load_state, save_state
from halfeven.zoo.weights import load_weights, read_weights

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Saved:
    """A checkpoint, the ways to change it, and the model that it is loaded into."""

    def __init__(self, path, **options):
        torch.manual_seed(0)
        fresh = prepare(Net(), IMAGES, scheme="w7a8", **options)
        qmodel = calibrate(copy.deepcopy(fresh), [IMAGES]).eval()
        save(qmodel, path, {"accuracy": 50.0})
        self.path, self.fresh, self.expected = path, fresh, qmodel(IMAGES)
        with safe_open(path, "pt") as file:
            self.facts = file.metadata()
            self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        self.whole = path.read_bytes()

    def write(self, tensors=(), facts=(), *, digest=True):
        tensors = self.tensors | dict(tensors)
        facts = self.facts | dict(facts)
        kept = {key: text for key, text in facts.items() if digest or key not in (TENSORS_DIGEST, FACTS_DIGEST)}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, self.path, kept)

    def load(self, *, anew=False):
        make = (lambda plan: rebuild(Net(), IMAGES, plan)) if anew else lambda plan: copy.deepcopy(self.fresh)
        return restore(self.path, make).eval()

    def planned(self, change):
        plan = json.loads(self.facts["plan"])
        change(plan)
        return {"plan": json.dumps(plan)}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("observed") / "q.safetensors")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return Saved(
        tmp_path_factory.mktemp("learned") / "q.safetensors",
        ranges="learned",
        learn_zero_points=True,
        quantize_outputs=True,
    )


@pytest.mark.parametrize("kind", ["observed", "learned"])
def test_flipped_bits_and_cuts(kind, request):
    saved = request.getfixturevalue(kind)
    draw = random.Random(0)
    for _ in range(100):
        content = bytearray(saved.whole)
        if draw.random() < 0.2:
            content = content[: draw.randrange(len(content))]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        saved.path.write_bytes(content)
        try:
            found = saved.load()(IMAGES)
        except HalfevenError:
            continue
        assert torch.equal(found, saved.expected)


def test_files_without_a_digest_load(observed, learned):
    for saved in (observed, learned):
        saved.write(digest=False)
        assert torch.equal(saved.load(anew=True)(IMAGES), saved.expected)


def test_changed_facts_are_refused(observed):
    observed.write(facts={"extra": json.dumps({"accuracy": 99.0})})
    with pytest.raises(CheckpointError, match=r"metadata .* digest"):
        read_facts(observed.path)
    observed.write(facts=observed.planned(lambda plan: plan["notes"].append("another")))
    with pytest.raises(CheckpointError, match=r"metadata .* digest"):
        observed.load()
    facts = {key: text for key, text in observed.facts.items() if key != FACTS_DIGEST}
    save_file(observed.tensors, observed.path, facts)
    with pytest.raises(CheckpointError, match="digest"):
        observed.load()


VALUES = {
    "scale 0": ("scale", 0.0),
    "scale -1": ("scale", -1.0),
    "scale 1e-45": ("scale", 1e-45),
    "scale 1e38": ("scale", 1e38),
    "scale NaN": ("scale", float("nan")),
    "scale infinite": ("scale", float("inf")),
    "zero point -129": ("zero_point", -129),
    "zero point 256": ("zero_point", 256),
    "zero point -2^31": ("zero_point", -(2**31)),
    "no such state": ("observing", 7),
    "low above high": ("low", 1e9),
    "high NaN": ("high", float("nan")),
    "negative variance": ("running_var", -1.0),
    "NaN weights": ("conv.weight", float("nan")),
    "infinite bias": ("head.bias", float("inf")),
}


@pytest.mark.parametrize("fault", VALUES)
def test_values_off_the_grid_are_refused_without_a_digest(observed, fault):
    ending, value = VALUES[fault]
    names = [name for name in observed.tensors if name.endswith(ending)]
    name = next((name for name in names if name.startswith("quantizers.")), names[0])
    observed.write({name: torch.full_like(observed.tensors[name], value)}, digest=False)
    with pytest.raises(CheckpointError, match=name.rpartition(".")[0].replace(".", r"\.")):
        observed.load()


def test_scales_of_weights_and_learned_values(learned):
    weight = next(name for name in learned.tensors if name.endswith("weight_quantizer.scale"))
    point = next(name for name, t in learned.tensors.items() if name.endswith("zero_point") and t.is_floating_point())
    for name, value in ((weight, 1e38), (weight, float("inf")), (point, 1e6)):
        learned.write({name: torch.full_like(learned.tensors[name], value)}, digest=False)
        with pytest.raises(CheckpointError, match="no quantized model has"):
            learned.load()
    # LSQ reflects a learned scale that training has brought below zero: its absolute value is used.
    learned.write({weight: -learned.tensors[weight]}, digest=False)
    assert torch.equal(learned.load()(IMAGES), learned.expected)


def test_another_dtype_is_refused(observed):
    weight = observed.tensors["head.weight"]
    for changed in (weight.view(torch.int32), weight.double(), weight.half()):
        observed.write({"head.weight": changed}, digest=False)
        with pytest.raises(CheckpointError, match="dtypes"):
            observed.load()


def scheme_of(key, value, kind="tensors"):
    return lambda plan: plan[kind][0]["scheme"].__setitem__(key, value)


PLANS = {
    "bits 4": scheme_of("bits", 4),
    "bits 3.5": scheme_of("bits", 3.5),
    "bits 17": scheme_of("bits", 17),
    "weight bits 8": scheme_of("bits", 8, "weights"),
    "signed x": scheme_of("signed", "x"),
    "axis 5": scheme_of("axis", 5, "weights"),
    "no scheme": lambda plan: plan["tensors"][0].pop("scheme"),
    "a list": lambda plan: plan.__setitem__("tensors", [[]]),
    "a number": lambda plan: plan.__setitem__("weights", 3),
    "no options": lambda plan: plan.pop("options"),
    "another observer": lambda plan: plan["tensors"][0].__setitem__("observer", "best"),
    "other ranges": lambda plan: plan["weights"][0].__setitem__("ranges", "none"),
    "channels 0": lambda plan: plan["weights"][0].__setitem__("channels", 0),
    "a new field": lambda plan: plan["tensors"][0].__setitem__("colour", "red"),
    "another name": lambda plan: plan["tensors"][0].__setitem__("name", 5),
}


@pytest.mark.parametrize("fault", PLANS)
def test_plans_that_cannot_be_are_refused_without_a_digest(observed, fault):
    observed.write(facts=observed.planned(PLANS[fault]), digest=False)
    with pytest.raises(CheckpointError, match="plan in"):
        observed.load()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "\ud800"[:0] + '{"options": {}}'])
def test_texts_that_are_no_plan(observed, text):
    observed.write(facts={"plan": text}, digest=False)
    with pytest.raises(CheckpointError, match="plan in"):
        observed.load()


def test_damaged_float_weights(tmp_path):
    path = tmp_path / "f.safetensors"
    save_weights(Net(), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="digest"):
        read_weights(path)
    for name, value in (("norm.running_var", -1.0), ("conv.weight", float("nan"))):
        save_file(Net().state_dict() | {name: torch.full_like(Net().state_dict()[name], value)}, path)
        with pytest.raises(CheckpointError, match=name):
            load_weights(Net(), path)


def a_state(**changes):
    values = dict(model={"w": torch.arange(300.0)}, optimizer={"state": {0: {"m": torch.ones(200)}}}, scaler={}, step=7)
    values |= dict(best={"top1": 1.0}, last={"top1": 0.5}, position={"seed": 0}, header='{"plan": 1}')
    return TrainingState(**values | changes)


def test_states_with_flipped_bits_and_cuts(tmp_path):
    path = tmp_path / "state.pt"
    save_state(a_state(), path)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for number in range(300):
        content = bytearray(whole)
        if number % 4 == 0:
            content = content[: draw.randrange(len(content))]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            found = load_state(path)
        except CheckpointError:
            refused += 1
            continue
        assert torch.equal(found.model["w"], torch.arange(300.0))
        assert torch.equal(found.optimizer["state"][0]["m"], torch.ones(200))
        assert (found.step, found.header) == (7, '{"plan": 1}')
    assert refused > 100


@pytest.mark.parametrize("change", [{"step": "7"}, {"model": None}, {"header": 3}, {"colour": 1}, {"optimizer": []}])
def test_states_of_other_content(tmp_path, change):
    torch.save({**vars(a_state()), **change}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="no whole training state"):
        load_state(tmp_path / "state.pt")


class History:
    """Like mmengine's HistoryBuffer: an array, and bound functions."""

    def __init__(self):
        self.values, self.methods, self.window = np.arange(3.0), {"mean": History.mean}, collections.deque([1, 2], 3)

    def mean(self):
        return self.values.mean()


class Config(dict):
    """Like mmengine's ConfigDict: a dict that pickles itself as its state."""

    def __getstate__(self):
        return dict(self)


class Program:
    """Unpickling this would run code."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def test_objects_of_unknown_classes_are_left_out(tmp_path):
    path, here = tmp_path / "epoch_3.pth", tmp_path / "code-ran"
    state = Net().state_dict()
    meta = {
        "history": History(),
        "lr": np.float64(0.1),
        "cfg": Config(a=1),
        "counts": collections.defaultdict(list, a=[1]),
    }
    torch.save({"meta": meta | {"bomb": Program(str(here))}, "state_dict": state}, path)
    with pytest.warns(UserWarning, match=r"_io\.open|builtins\.open|test_checkpoints"):
        found = read_weights(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert not here.exists()


@pytest.mark.parametrize("content", ["module", "blocked", "nothing", "text", "weights of code"])
def test_refusals_advise_nothing_dangerous(tmp_path, content):
    import os

    class Command:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'code-ran'}",))

    path = tmp_path / "m.pth"
    if content in ("nothing", "text"):
        path.write_bytes(b"" if content == "nothing" else b"<html>404</html>")
    else:
        objects = {"module": nn.Linear(2, 2), "blocked": {"a": Command()}, "weights of code": {"w": Program("x")}}
        torch.save(objects[content], path)
    with pytest.raises(CheckpointError) as refusal:
        read_weights(path)
    message = str(refusal.value)
    assert "weights_only" not in message
    assert "\x1b" not in message
    assert not (tmp_path / "code-ran").exists()


def test_a_changed_part_of_a_pth_file(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"w": torch.ones(64)}, path)
    content = path.read_bytes().replace(np.float32(1).tobytes() * 8, np.float32(2).tobytes() * 8, 1)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_weights(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(64)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(part.CRC == 0 for part in zipfile.ZipFile(path).infolist())
    assert torch.equal(read_weights(path)["w"], torch.ones(64))


def test_averaged_weights_are_a_choice(tmp_path):
    path = tmp_path / "m.pth"
    state = Net().state_dict()
    average = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()} | {
        "steps": torch.tensor(9)
    }
    torch.save({"state_dict": state, "ema_state_dict": average}, path)
    model = Net()
    with pytest.warns(UserWarning, match=r'"state_dict", "ema_state_dict".*model\.weights_entry'):
        load_weights(model, path)
    assert torch.equal(model.conv.weight, state["conv.weight"])
    load_weights(model, path, "ema_state_dict")
    assert not model.conv.weight.any()
    with pytest.raises(CheckpointError, match='no weights under "state_dict_ema"'):
        load_weights(model, path, "state_dict_ema")
