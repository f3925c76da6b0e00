"""Damage to files: flipped bits, cuts, and values that cannot be, in checkpoints and training states."""

import copy
import json
import random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from halfeven.checkpoint import restore, save
from halfeven.integrity import FACTS_DIGEST, TENSORS_DIGEST
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import prepare, rebuild
from halfeven.training.state import TrainingState

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

    def with_value(self, ending, value):
        """The tensor, by its name, that a fault of `VALUES` changes; of several that of an activation."""
        names = [name for name in self.tensors if name.endswith(ending)]
        name = next((name for name in names if name.startswith("quantizers.")), names[0])
        return {name: torch.full_like(self.tensors[name], value)}


def damaged(content: bytes, draw: random.Random, cuts: float = 0.25) -> bytes:
    """The bytes of a file with a flipped bit, or cut off; `cuts` is the share of the latter."""
    if draw.random() < cuts:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


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


def a_state(**changes):
    values = dict(model={"w": torch.arange(300.0)}, optimizer={"state": {0: {"m": torch.ones(200)}}}, scaler={}, step=7)
    values |= dict(best={"top1": 1.0}, last={"top1": 0.5}, position={"seed": 0}, header='{"plan": 1}')
    return TrainingState(**values | changes)


def same_state(found: TrainingState) -> bool:
    """True where a state is that of `a_state`."""
    wanted = a_state()
    tensors = torch.equal(found.model["w"], wanted.model["w"])
    moments = torch.equal(found.optimizer["state"][0]["m"], wanted.optimizer["state"][0]["m"])
    return tensors and moments and (found.step, found.header) == (wanted.step, wanted.header)
