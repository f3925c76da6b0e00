"""`halfeven init`: the configs that come with halfeven, written where the user can change them."""

import json
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from halfeven.cli.arguments import Folder
from halfeven.errors import ConfigError
from halfeven.files import write_atomically

QUICKSTART = Path("quickstart") / "digits.py"


@dataclass(frozen=True, kw_only=True)
class InitArguments:
    """Write the quickstart's config and the recipes for training and post-training quantization to FOLDER/configs."""

    folder: Folder = Path(".")
    """Folder in which the folder `configs` is made; without it, the current folder."""
    overwrite: bool = False
    """Replace configs that are there and differ."""
    json: str = ""
    """File to write the paths of the configs to as JSON, with the keys written and kept; "" for none."""


def run_init(arguments: InitArguments) -> None:
    """Write the configs, and print the command that runs the quickstart.

    Raises:
        ConfigError: configs that differ are there already, and --overwrite was not given.
    """
    source = configs_folder()
    target = arguments.folder / "configs"
    configs = {target / path.relative_to(source): path.read_bytes() for path in sorted(source.rglob("*.py"))}
    differing = [path for path, content in configs.items() if path.exists() and _content_if_there(path) != content]
    if differing and not arguments.overwrite:
        raise ConfigError(
            f"{', '.join(map(str, differing))} {'is' if len(differing) == 1 else 'are'} there already and would be "
            "lost, so nothing was written. Give another FOLDER, or --overwrite to replace them."
        )
    missing = {path: content for path, content in configs.items() if not path.exists() or path in differing}
    for path, content in missing.items():
        write_atomically(path, partial(Path.write_bytes, data=content))
    print(
        f"Wrote {len(missing)} of {len(configs)} configs to {target}; the others are there already."
        if len(missing) < len(configs)
        else f"Wrote {len(configs)} configs to {target}."
    )
    if arguments.json:
        names = {"written": [str(path) for path in missing], "kept": [str(p) for p in configs if p not in missing]}
        text = json.dumps(names, indent=2) + "\n"
        write_atomically(Path(arguments.json), lambda path: path.write_text(text, encoding="utf-8"))
    print(f"The quickstart is `halfeven train {target / QUICKSTART}`.")


def configs_folder() -> Path:
    """Return the folder of the configs: the installed package's, or the repository's in an editable installation."""
    installed = Path(str(files("halfeven"))) / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def _content_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
