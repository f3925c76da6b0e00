"""Finished units of a reconstruction, on disk: a run that was killed goes on where it was."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfeven.errors import CheckpointError
from halfeven.files import write_atomically
from halfeven.graph.view import module_of
from halfeven.layerwise.blocks import Unit
from halfeven.layerwise.cache import Stored
from halfeven.placement.insertion import plan_of
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.optimize import Outcome, learned_quantizers

INDEX = "run.json"


@dataclasses.dataclass(frozen=True)
class Saved:
    """The folder of one reconstruction; None where nothing is to be kept."""

    folder: Path | None
    options: PTQOptions

    @staticmethod
    def open(
        folder: Path | None, qmodel: nn.Module, inputs: Sequence[Stored], options: PTQOptions, granularity: str
    ) -> "Saved":
        """Open the folder of a run, new or interrupted.

        Raises:
            CheckpointError: it holds the units of a run with another model, other data or other options.
        """
        if folder is None:
            return Saved(None, options)
        index, facts = folder / INDEX, _facts(qmodel, inputs, options, granularity)
        if index.is_file() and json.loads(index.read_text(encoding="utf-8")) != facts:
            raise CheckpointError(
                f"{folder} holds the finished units of another reconstruction (another model, other images or other "
                "options), which would be mixed with this one's. Delete that folder, or give another one."
            )
        write_atomically(index, lambda path: path.write_text(json.dumps(facts, indent=2), encoding="utf-8"))
        return Saved(folder, options)

    def keep(self, name: str, unit: Unit, outcome: Outcome) -> None:
        """Write what a unit has learned."""
        if self.folder is not None:
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in _state(unit).items()}
            facts = {"outcome": json.dumps(dataclasses.asdict(outcome))}
            write_atomically(self._file(name, unit), lambda path: save_file(state, path, facts))

    @torch.no_grad()
    def restore(self, name: str, unit: Unit) -> Outcome | None:
        """Give a unit what it had learned before the interruption; None where it had not come to it."""
        if self.folder is None or not self._file(name, unit).is_file():
            return None
        with safe_open(self._file(name, unit), "pt") as file:
            outcome = Outcome(**json.loads(file.metadata()["outcome"]))
            for key, tensor in _state(unit).items():
                tensor.copy_(file.get_tensor(key))
        for quantizer in learned_quantizers(unit, self.options):
            quantizer.fix_scale(quantizer.scale.detach().clone())
        return outcome

    def _file(self, name: str, unit: Unit) -> Path:
        assert self.folder is not None
        # A layer that is called several times, as a detector's head, gives its name to several units.
        whole = _digest(part.encode() for part in (name, *(f"/{node.name}" for node in unit.nodes)))
        return self.folder / f"{whole[:16]}.safetensors"


def _facts(qmodel: nn.Module, inputs: Sequence[Stored], options: PTQOptions, granularity: str) -> dict[str, Any]:
    """What tells one run from another; where activations are stored makes no difference."""
    kept = dataclasses.replace(options, memory=1.0, cache_folder="auto")
    return {
        "granularity": granularity,
        "options": dataclasses.asdict(kept),
        "plan": _digest([json.dumps(plan_of(qmodel).to_dict(), sort_keys=True).encode()]),
        "model": _digest(_bytes(tensor) for tensor in qmodel.state_dict().values()),
        "inputs": _digest(_bytes(tensor) for stored in inputs for tensor in _tensors(stored.load())),
    }


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _state(unit: Unit) -> dict[str, Tensor]:
    """Parameters and buffers of the modules that a unit calls, by their names in the region."""
    modules = {str(node.target): module_of(node) for node in unit.nodes if node.op == "call_module"}
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}
