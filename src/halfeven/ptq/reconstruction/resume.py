"""Finished blocks of a reconstruction on disk, from which a killed run goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halfeven.errors import CheckpointError
from halfeven.files import json_text, json_value, write_atomically
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op
from halfeven.integrity import check_facts, check_tensors, sealed
from halfeven.layerwise.blocks import Block
from halfeven.layerwise.cache import Stored
from halfeven.placement.insertion import plan_of
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.optimize import BlockResult, learned_quantizers

INDEX_FILE = "run.json"
"""File with the facts that identify a run."""


@dataclasses.dataclass(frozen=True)
class BlockStore:
    """The finished blocks of one reconstruction, a file each."""

    folder: Path | None
    """None: nothing is kept."""
    options: PTQOptions

    @staticmethod
    def open(
        folder: Path | None, qmodel: nn.Module, inputs: Sequence[Stored], options: PTQOptions, granularity: str
    ) -> "BlockStore":
        """Open the folder of a run, new or interrupted.

        Raises:
            CheckpointError: the folder holds blocks of a run with another model, other data or other options.
        """
        if folder is None:
            return BlockStore(None, options)
        index = folder / INDEX_FILE
        facts = json_value(_identifying_facts(qmodel, inputs, options, granularity))
        if index.is_file() and _read_index(index) != facts:
            raise CheckpointError(
                f"{folder} holds the finished blocks of another reconstruction (another model, other samples or other "
                "options), and they would be mixed with the blocks of this run. Delete the folder, or give another "
                "resume_dir."
            )
        write_atomically(index, lambda path: path.write_text(json_text(facts, indent=2), encoding="utf-8"))
        return BlockStore(folder, options)

    def save(self, name: str, block: Block, result: BlockResult) -> None:
        """Write the parameters and buffers of an optimized block, with its errors."""
        if self.folder is not None:
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in _block_state(block).items()}
            facts = sealed(state, {"outcome": json.dumps(dataclasses.asdict(result))})
            write_atomically(self._block_file(name, block), lambda path: save_file(state, path, facts))

    @torch.no_grad()
    def restore(self, name: str, block: Block) -> BlockResult | None:
        """Load the parameters and buffers of a block, and return its errors; None where it was not finished."""
        if self.folder is None or not self._block_file(name, block).is_file():
            return None
        path = self._block_file(name, block)
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                check_facts(facts, path)
                result = BlockResult(**json.loads(facts["outcome"]))
                found = {key: file.get_tensor(key) for key in _block_state(block)}
            # The digest is checked before anything is copied into the block.
            check_tensors(found, facts, path)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged_error(path, error) from error
        for key, tensor in _block_state(block).items():
            if found[key].shape != tensor.shape or found[key].dtype != tensor.dtype:
                raise _damaged_error(path, f"{key} is {found[key].dtype} of shape {tuple(found[key].shape)}")
            tensor.copy_(found[key])
        # The tensors are loaded, but the state of a quantizer is a Python attribute: it must be set to fixed as
        # `optimize_block` did.
        for quantizer in learned_quantizers(block, self.options):
            quantizer.fix_scale(quantizer.scale.detach().clone())
        return result

    def _block_file(self, name: str, block: Block) -> Path:
        assert self.folder is not None
        # A layer that is called several times, as in a detector's head, gives its name to several blocks.
        digest = _sha256_of(part.encode() for part in (name, *(f"/{node.name}" for node in block.nodes)))
        return self.folder / f"{digest[:16]}.safetensors"


def _read_index(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged_error(path, error) from error


def _damaged_error(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason}), so the finished blocks of the reconstruction cannot be trusted. Delete the "
        f"folder {path.parent}: the reconstruction then starts from its first block, and nothing else is lost."
    )


def _identifying_facts(
    qmodel: nn.Module, inputs: Sequence[Stored], options: PTQOptions, granularity: str
) -> dict[str, Any]:
    """Return the facts that tell two runs apart; the memory bound and the cache folder do not."""
    kept = dataclasses.replace(options, memory=1.0, cache_folder="auto")
    return {
        "granularity": granularity,
        "options": dataclasses.asdict(kept),
        # Ranges are buffers in the state dict, so that another calibration is another run.
        "plan": _sha256_of([json.dumps(plan_of(qmodel).to_dict(), sort_keys=True).encode()]),
        "model": _sha256_of(_tensor_bytes(tensor) for tensor in qmodel.state_dict().values()),
        "inputs": _sha256_of(_tensor_bytes(tensor) for stored in inputs for tensor in _tensor_leaves(stored.load())),
    }


def _sha256_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensor_leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _block_state(block: Block) -> dict[str, Tensor]:
    """Return the parameters and buffers of the modules that a block calls, by their names in the region."""
    modules = {op.path: op.module for op in map(Op, block.nodes)}
    return {
        f"{path}.{key}": tensor
        for path, module in modules.items()
        if module is not None
        for key, tensor in module.state_dict().items()
    }
