"""Notice that a file is damaged: by digests in safetensors files, by checksums in the files of torch.save."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfeven.errors import MAX_NAMES, CheckpointError

TENSORS_DIGEST = "digest_of_tensors"
FACTS_DIGEST = "digest_of_facts"
"""Keys of the digests, SHA-256 in hexadecimal, in a file's metadata."""


def sealed(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file: the facts, a digest of its tensors, and a digest of all facts."""
    content = {key: text for key, text in facts.items() if key not in (TENSORS_DIGEST, FACTS_DIGEST)}
    content[TENSORS_DIGEST] = digest_of_tensors(tensors)
    return content | {FACTS_DIGEST: _digest_of_facts(content)}


def check_facts(metadata: Mapping[str, str], path: Path) -> None:
    """Check the metadata of a file against its digest; the files of earlier versions have none.

    Raises:
        CheckpointError: a fact was changed after the file was written.
    """
    content = {key: text for key, text in metadata.items() if key != FACTS_DIGEST}
    if metadata.get(FACTS_DIGEST, _digest_of_facts(content)) != _digest_of_facts(content):
        raise _changed_error(path, "metadata (its plan or its results)")
    # They are written together, so that one alone was changed afterwards.
    if (FACTS_DIGEST in metadata) != (TENSORS_DIGEST in metadata):
        raise _changed_error(path, "digests")


def check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Check the tensors of a file, by name, against the digest in its metadata, if it has any.

    Raises:
        CheckpointError: a tensor was changed after the file was written.
    """
    digest = metadata.get(TENSORS_DIGEST)
    if digest is not None and digest != digest_of_tensors(tensors):
        raise _changed_error(path, "tensors")


def _changed_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: its {what} do not have the digest that was written with them, so the model would compute "
        "something else. Copy the file again from where it was written, or use another checkpoint."
    )


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_facts(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def check_zip(path: Path) -> None:
    """Compare each part of a file that `torch.save` wrote with its checksum (CRC-32).

    A file without checksums (`torch.serialization.set_crc32_options(False)` writes zeros) cannot be checked.

    Raises:
        CheckpointError: the file is cut, or a part of it was changed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # torch.save never compresses, so that both sizes are the same.
            bad = next((part.filename for part in parts if part.file_size != part.compress_size), None)
            if bad is None and any(part.CRC for part in parts):
                bad = archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # a damaged zip meets whatever its reader stumbles over
        raise CheckpointError(f"{path} is damaged: {_cut_or_changed(error)}.") from error
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: its part {bad} does not have the checksum that was written with it.")


def _cut_or_changed(error: Exception) -> str:
    cut = isinstance(error, zipfile.BadZipFile) and "not a zip" in str(error)
    return "its end is missing" if cut else f"its table of contents cannot be read ({type(error).__name__})"


def wrong_values(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that no training or quantization leaves behind, each with its fault.

    Args:
        found: state dict of a file.
        wanted: state dict of the model, with other values. What is NaN or infinite there (the minus infinity of a mask,
            a range that is not set) may be so in the file.
    """
    problems = []
    for name, tensor in found.items():
        if name not in wanted or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all() and torch.isfinite(wanted[name]).all():
            problems.append(f"{name} holds NaN or infinity")
        elif name.endswith("running_var") and (tensor < 0).any():
            problems.append(f"{name} is a variance below zero")
    return problems


def listed(problems: list[str]) -> str:
    """Return problems as lines of a message; a long list is cut."""
    more = [f"and {len(problems) - MAX_NAMES} more"] if len(problems) > MAX_NAMES else []
    return "\n".join(f"  {line}" for line in [*problems[:MAX_NAMES], *more])
