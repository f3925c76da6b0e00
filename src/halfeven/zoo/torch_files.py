"""Read the tensors of files that `torch.save` wrote, whatever else is in them, without running any code of theirs."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from halfeven.errors import CheckpointError, named
from halfeven.integrity import check_zip

ZIP_MAGIC = b"PK\x03\x04"
"""Beginning of the files of torch.save since torch 1.6."""
COMMON_PACKAGES = ("_codecs", "builtins", "collections", "numpy")
"""Packages whose classes many files name."""


class StandIn:
    """Takes the place of a class or function that a file names: it accepts any arguments and does nothing."""

    fills: Any = None
    """Class of the object that it makes instead, which can be filled with items; None: an object of its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object that ignores its arguments."""
        return super().__new__(cls) if cls.fills is None else cls.fills()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state of the object that stood in the file."""


def is_torch_file(path: Path) -> bool:
    """Return True for a file that begins as those of torch.save do."""
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def read_torch_file(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the content of a .pth file, and the names of classes and functions whose objects are left out of it.

    torch's reader for weights alone refuses a file with any object that it does not know, such as the training history
    in a checkpoint of mmengine. Here an object of `StandIn` takes the place of each. No module of the file is imported.

    Raises:
        CheckpointError: the file is damaged, or cannot be read without running code.
    """
    is_zip = is_torch_file(path)
    if is_zip:
        try:
            check_zip(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} So there are no weights for the model. Download or write it again."
            ) from error
    names = _unknown_names(path) if is_zip else ()
    stand_ins = {name: type(f"StandIn{number}", (StandIn,), {}) for number, name in enumerate(names)}
    # Each pass that fails makes one more stand-in fillable, or ends the loop.
    while True:
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()]):
                return torch.load(path, map_location="cpu", weights_only=True), names
        except pickle.UnpicklingError as error:
            # Nothing in a file says beforehand which of its objects are filled as lists or dicts are.
            if not _make_fillable(str(error), list(stand_ins.values())):
                raise _unreadable_error(path, error, names) from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged file meets whatever its reader stumbles over
            raise _unreadable_error(path, error, names) from error


def _unknown_names(path: Path) -> tuple[str, ...]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # What a user looks for in a message is the library that wrote the file.
        return tuple(sorted(names, key=lambda name: (name.partition(".")[0] in COMMON_PACKAGES, name)))
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable_error(path, error, ()) from error


def _make_fillable(message: str, stand_ins: list[type[StandIn]]) -> bool:
    """Make the stand-in at which reading failed a list or a dict. Return False where that was not the reason."""
    # torch's message has the pickle instruction that failed, SETITEM(S) or APPEND(S), and the class of the object.
    found = re.search(r"Can only (\w+).*StandIn(\d+)'", message, re.DOTALL)
    if found is None or stand_ins[int(found[2])].fills is not None:
        return False
    stand_ins[int(found[2])].fills = OrderedDict if found[1].startswith("SETITEM") else list
    return True


def _unreadable_error(path: Path, error: Exception, names: tuple[str, ...]) -> CheckpointError:
    if "torchscript" in str(error).lower():
        return CheckpointError(
            f"{path} is a TorchScript program, and halfeven reads tensors alone. Load it where you trust it, and save "
            "model.state_dict() with torch.save."
        )
    told = f" (it names {named(names)})" if names else ""
    return CheckpointError(
        f"The weights file {path} cannot be read as tensors alone{told}: it is damaged, or reading it "
        f"would run code, which halfeven never does ({type(error).__name__}). Download it again; if you trust "
        "its source, save model.state_dict() alone with torch.save where it was made."
    )
