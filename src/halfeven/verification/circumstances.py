"""The circumstances of a report: the size of the file on disk, and the threads that ran it."""

from pathlib import Path
from typing import Any

from halfeven.runtimes.runtime import DeployedFile


def circumstances(file: DeployedFile, path: Path) -> dict[str, Any]:
    """Return the report's fields about the file and the session that it ran in."""
    return {"file_bytes": file_bytes(path), "threads": file.threads, "settings": list(file.settings)}


def file_bytes(path: Path) -> int:
    """Return the size of a deployed file in bytes, with that of the file beside it which holds its tensors."""
    # IR keeps its tensors in a .bin; an ONNX model beyond 2 GB keeps them in a .data file.
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(f"{path.name}.data")]
    return sum(each.stat().st_size for each in (path, *beside) if each.is_file())
