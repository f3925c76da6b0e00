"""Accuracy on CIFAR-10 as photographs: the configs' recipes, beside the float model trained for as long.

    python benchmarks/cifar10.py CIFAR10 --work FOLDER [--model resnet18] [--runs control qat lsq ptq] [--seeds 0 1 2]
        [--weights FLOAT.safetensors] [--float-epochs 30] [--epochs 10] [--json FILE]

CIFAR10 is a folder with train/CLASS/IMAGE and val/CLASS/IMAGE. Without --weights a float model is trained first, on
batches of 64 at a rate of 0.05 that falls by a cosine (Nesterov's momentum, weight decay 5e-4). A run is one command of
halfeven, whose config is changed in nothing but folder, weights, seed, epochs and what `RUNS` says; "control" and
"control, 4 bits" train the float model with the same options. A run that is finished in FOLDER is not repeated.

Scored are the *last* weights of each training, which no validation image has chosen, on all validation images: in float
or simulated, and as deployed on this machine. The difference to the control of the same seed, where it is among the
runs, or else to the float model that the run started from, is paired by image, with its 95 % interval.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

import halfeven as he
from halfeven.checkpoint import save_weights
from halfeven.cli.run import open_run
from halfeven.cli.work_folder import BEST_FILE, LAST_FILE
from halfeven.config import DataOptions, ModelOptions, TrainingOptions, load_experiment
from halfeven.evaluation import evaluation_loader
from halfeven.training.state import STATE_FILE
from halfeven.training.trainer import Trainer
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.models import create_model
from halfeven.zoo.weights import load_weights

CONFIGS = Path(__file__).parent.parent / "configs"
FLOAT = TrainingOptions(batch_size=64, learning_rate=0.05, nesterov=True, weight_decay=5e-4)
AT_4_BITS = {"learning_rate": 0.01, "schedule": "cosine"}
LOW_BITS = "--training.learning-rate 0.01 --training.schedule cosine --quantization.ranges auto "
LOW_BITS += "--quantization.weight-observer auto --quantization.activation-observer mse --quantization.scheme"
RUNS = {
    "qat": ("train", "qat/cifar10_{model}.py", ""),
    "lsq": ("train", "qat/cifar10_{model}_lsq.py", ""),
    "ptq": ("ptq", "ptq/cifar10_{model}.py", ""),
    "w4a4": ("train", "qat/cifar10_{model}.py", f"{LOW_BITS} w4a4"),
    "w4a8": ("train", "qat/cifar10_{model}.py", f"{LOW_BITS} w4a8"),
}
"""Name -> command, config, further options."""
CONTROLS: dict[str, dict[str, Any]] = {"control": {}, "control, 4 bits": AT_4_BITS}
"""Float trainings: name -> what differs from the options of training in the config."""
CONTROL_OF = {"qat": "control", "lsq": "control", "w4a4": "control, 4 bits", "w4a8": "control, 4 bits"}


def config_of(name: str, model: str) -> Path:
    """The config of a run."""
    path = RUNS[name][1] if name in RUNS else "qat/cifar10_{model}.py"
    return CONFIGS / path.format(model=model.removesuffix("_100"))


def run_command(options: argparse.Namespace, name: str, seed: int, weights: Path, folder: Path, log: IO[str]) -> None:
    """Run a command of halfeven; one that was interrupted goes on."""
    verb, _, further = RUNS[name]
    command = [sys.executable, CONFIGS.parent / "tools" / f"{verb}.py", config_of(name, options.model)]
    command += ["--data.root", options.data, "--model.weights", weights, "--seed", str(seed), "--work-dir", folder]
    command += ["--export.timed", "False", *further.split()]
    if verb == "train":
        command += ["--training.epochs", str(options.epochs)]
    if folder.is_dir():
        command.append("--resume")
    subprocess.run(command, check=True, stdout=log, stderr=log)


def train_float(
    options: argparse.Namespace, name: str, seed: int, weights: Path | None, folder: Path, log: IO[str]
) -> None:
    """Train a float model: from scratch, or from weights with the options of the quantized training."""
    experiment = load_experiment(config_of(name, options.model))
    training = FLOAT if weights is None else dataclasses.replace(experiment.training, **CONTROLS[name])
    epochs = options.float_epochs if weights is None else options.epochs
    experiment = dataclasses.replace(
        experiment,
        seed=seed,
        model=dataclasses.replace(experiment.model, weights=str(weights or "")),
        data=dataclasses.replace(experiment.data, root=str(options.data)),
    )
    context = open_run(experiment, folder)
    trainer = Trainer(
        create_model(experiment.model),
        context.datasets.train,
        dataclasses.replace(training, epochs=epochs),
        dataclasses.replace(context.place(folder, name), console=Console(file=log, force_terminal=False)),
        task=context.task,
        validate=context.selection_accuracy,
        save=save_weights,
    )
    trainer.run(resume=(folder / STATE_FILE).is_file())
    (folder / "results.json").write_text("{}")


def finished(options: argparse.Namespace, name: str, seed: int, weights: Path | None) -> Path:
    """The folder of a run, which is done, or gone on with, unless its results are there."""
    folder = options.work / f"{options.model}_{name.replace(', ', '_').replace(' ', '')}_{seed}"
    if not (folder / "results.json").is_file():
        print(f"{folder.name} ...", flush=True)
        with (options.work / f"{folder.name}.log").open("a") as log:
            if name in RUNS and weights is not None:
                run_command(options, name, seed, weights, folder, log)
            else:
                train_float(options, name, seed, weights, folder, log)
    return folder


@torch.no_grad()
def answers(model: Any, images: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """The class that the model gives each image, and its label."""
    found = [(model(x).argmax(1), y) for x, y in evaluation_loader(images, 100, 2)]
    return torch.cat([classes for classes, _ in found]), torch.cat([labels for _, labels in found])


def scored(options: argparse.Namespace, folder: Path, name: str, weights: Path, images: Dataset[Any]) -> dict[str, Any]:
    """Right answers of the last weights of a run, by image; the second run reads them from the folder."""
    if (stored := folder / "answers.pt").is_file():
        return torch.load(stored)
    model = create_model(ModelOptions(source="timm", name=options.model, num_classes=10))
    if name not in RUNS:
        load_weights(model, weights if name == "float" else folder / LAST_FILE)
        classes, labels = answers(model.eval(), images)
        found = {"simulated": classes == labels}
    else:
        load_weights(model, weights)
        last = folder / LAST_FILE
        qmodel = he.load(last if last.is_file() else folder / BEST_FILE, model, torch.zeros(2, 3, 32, 32)).eval()
        deployed = he.load_deployed(he.export(qmodel, folder / "last.xml"))
        classes, labels = answers(qmodel, images)
        in_file, _ = answers(deployed, images)
        found = {"simulated": classes == labels, "deployed": in_file == labels, "same": classes == in_file}
    torch.save(found, stored)
    return found


def paired(found: Tensor, control: Tensor) -> tuple[float, float]:
    """Difference in percentage points, and half of its 95 % interval over the images."""
    difference = 100 * (found.double() - control.double())
    return float(difference.mean()), 1.96 * float(difference.std()) / len(difference) ** 0.5


def row(found: dict[str, Tensor], reference: Tensor, against: str) -> dict[str, Any]:
    """The figures of a run beside the right answers of a reference, which is named."""
    figures = {part: 100 * float(right.double().mean()) for part, right in found.items()}
    for part in set(found) - {"same"}:
        figures[f"{part}, difference"], figures[f"{part}, interval"] = paired(found[part], reference)
    return {"against": against, **{name: round(value, 2) for name, value in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=["resnet18", "mobilenetv2_100"], default="resnet18")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--runs", nargs="+", choices=[*CONTROLS, *RUNS], default=["control", "qat", "lsq", "ptq"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--float-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    weights = options.weights or finished(options, "float", 0, None) / LAST_FILE
    data = DataOptions(source="image_folder", root=str(options.data), image_size=32, resize=37)
    images = load_datasets(data).validation
    given = options.work / f"{options.model}_start"
    given.mkdir(exist_ok=True)
    start = scored(options, given, "float", weights, images)["simulated"]
    print(f"float: {100 * float(start.double().mean()):.2f} %", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        rights: dict[str, Tensor] = {}
        for name in options.runs:
            found = scored(options, finished(options, name, seed, weights), name, weights, images)
            rights[name] = found["simulated"]
            control = CONTROL_OF.get(name)
            against = control if control in rights else "float"
            rows[f"{name}, seed {seed}"] = row(found, rights.get(against, start), against)
            print(f"{name}, seed {seed}: {rows[f'{name}, seed {seed}']}", flush=True)
    for name in options.runs:
        of_seeds = [rows[f"{name}, seed {seed}"] for seed in options.seeds]
        differences = [of_seed["simulated, difference"] for of_seed in of_seeds]
        spread = f", standard deviation {statistics.stdev(differences):.2f} over seeds" if len(of_seeds) > 1 else ""
        print(f"{name}: {statistics.mean(differences):+.2f} points against {of_seeds[0]['against']}{spread}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
