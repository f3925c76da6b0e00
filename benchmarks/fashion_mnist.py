"""Accuracy on Fashion-MNIST: float, calibrated, after 100 steps of QAT; and the deployed file's parity and speed.

    python benchmarks/fashion_mnist.py resnet18 WEIGHTS.safetensors [--scheme w8a8] [--seeds 0 1 2] [--json FILE]

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path. Calibration takes 512
training images; training is SGD with momentum 0.9, learning rate 0.01 falling by a cosine, batches of 64, for the float
model as for the quantized one.
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import halfeven as he
from halfeven.quantizer import set_observing
from halfeven.training.optimization import make_optimizer
from halfeven.training.options import TrainingOptions
from halfeven.zoo.datasets import DataOptions, load_datasets

STEPS, BATCH, RATE = 100, 64, 0.01


def images_of(dataset: object, count: int | None = None) -> tuple[Tensor, Tensor]:
    """A data set as two tensors."""
    samples = [dataset[i] for i in range(count or len(dataset))]  # type: ignore[index,arg-type]
    return torch.stack([torch.as_tensor(s[0]) for s in samples]), torch.tensor([int(s[1]) for s in samples])


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * right / len(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """The 100 steps, the same batches for every model of a seed."""
    model.train()
    optimizer = make_optimizer(
        model, TrainingOptions(optimizer="sgd", learning_rate=RATE, momentum=0.9, weight_decay=0.0)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        index = order[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
    set_observing(model, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name of the float model")
    parser.add_argument("weights", type=Path, help="its .safetensors")
    parser.add_argument("--root", default="", help="folder of the IDX files; not given: Debian's")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--ranges", nargs="+", default=["observed", "learned"])
    parser.add_argument("--observer", default="mse")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--verify", type=int, default=0, help="test images to verify the deployed file on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    datasets = load_datasets(DataOptions(source="fashion_mnist", root=options.root))
    test, training = images_of(datasets.validation), images_of(datasets.train)
    model = timm.create_model(options.model, in_chans=1, num_classes=10)
    model.load_state_dict(load_file(options.weights))
    rows: dict[str, list[float]] = {"float": [top1(model, *test)]}
    for seed in options.seeds:
        choice = torch.randperm(len(training[0]), generator=torch.Generator().manual_seed(seed))[:512]
        trained = copy.deepcopy(model)
        train(trained, *training, seed)
        rows.setdefault("float, 100 steps", []).append(top1(trained, *test))
        for ranges in options.ranges:
            qmodel = he.prepare(
                model, test[0][:2], scheme=options.scheme, ranges=ranges, activation_observer=options.observer,
                weight_observer="minmax" if options.scheme.startswith("w8") else "mse",
            )  # fmt: skip
            he.calibrate(qmodel, training[0][choice].split(64))
            rows.setdefault("calibrated", []).append(top1(qmodel, *test)) if ranges == options.ranges[0] else None
            train(qmodel, *training, seed)
            rows.setdefault(f"QAT, {ranges} ranges", []).append(top1(qmodel, *test))
            print({name: values[-1] for name, values in rows.items()}, flush=True)
    for name, values in rows.items():
        print(f"{options.model} {options.scheme} {name:24} {statistics.median(values):6.2f}  {values}", flush=True)
    result: dict[str, object] = {"model": options.model, "scheme": options.scheme, "top1": rows}
    if options.verify:
        result["verify"] = verify(qmodel, model, test, options.verify)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def verify(qmodel: nn.Module, model: nn.Module, test: tuple[Tensor, Tensor], count: int) -> dict[str, object]:
    """Export the last model trained and compare the file with it."""
    batches = list(zip(test[0][:count].split(32), test[1][:count].split(32), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = he.export(qmodel, Path(folder) / "model.xml")
        report = he.verify(qmodel, path, batches, float_model=model)
        print(report)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"  size of the files / float weights  {size / sum(4 * p.numel() for p in model.parameters()):.3f}")
    return {**report.to_dict(), "tensors": None}


if __name__ == "__main__":
    main()
