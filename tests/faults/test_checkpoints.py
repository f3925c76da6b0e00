"""A changed checkpoint, state or weights file is refused with a message, or gives the same numbers."""

import collections
import json
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from halfeven.checkpoint import read_facts, save_weights
from halfeven.errors import CheckpointError, HalfevenError
from halfeven.integrity import FACTS_DIGEST
from halfeven.training.state import load_state, save_state
from halfeven.zoo.weights import load_weights, read_weights

from .mutations import IMAGES, PLANS, VALUES, Net, Saved, a_state, damaged, same_state


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
        saved.path.write_bytes(damaged(saved.whole, draw))
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


@pytest.mark.parametrize("fault", VALUES)
def test_values_off_the_grid_are_refused_without_a_digest(observed, fault):
    ending, value = VALUES[fault]
    changed = observed.with_value(ending, value)
    name = next(iter(changed))
    observed.write(changed, digest=False)
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


def test_states_with_flipped_bits_and_cuts(tmp_path):
    path = tmp_path / "state.pt"
    save_state(a_state(), path)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        path.write_bytes(damaged(whole, draw))
        try:
            found = load_state(path)
        except CheckpointError:
            refused += 1
            continue
        assert same_state(found)
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
