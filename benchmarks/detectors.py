"""Eight small detectors on made-up scenes: float, after calibration, after training; in two runtimes, beside NNCF.

    python benchmarks/detectors.py [retinanet yolo ...] [--scheme w8a8] [--file-scheme w7a8] [--sure 0.3] [--json FILE]
    python benchmarks/detectors.py --weights FOLDER --nncf NNCF_ENV/bin/python

Each float detector is trained from scratch for some minutes, or its weights are read from FOLDER/NAME.pt, and written
there after a training. Then, for OpenVINO and ONNX Runtime, `he.quantize` with defaults on 256 scenes, and a short
training of the quantized model. Measured are mAP of the simulation, mAP of the file in its runtime, and the agreement
of boxes: the share of the boxes of both models, with a score of at least `--sure`, that the other model has too, with
an overlap of 0.5 and the same class. A processor without VNNI overflows in files of 8 x 8 bits: `--file-scheme` gives
the bits of the files. What FILE has already is not measured again: take a new one for a new float model.

NNCF quantizes the float file with its defaults, in OpenVINO and in ONNX, under the Python of an environment that has
it, openvino and onnx; it need not have halfeven.
"""

import argparse
import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

import halfeven as he
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat
from halfeven.runtimes.runtime import load_deployed
from halfeven.tasks.detection import Detection
from halfeven.tasks.detection_by_library import detection_of
from halfeven.training.optimization import make_optimizer
from halfeven.training.options import TrainingOptions
from halfeven.zoo import small_detectors
from halfeven.zoo.datasets import Datasets, load_datasets
from halfeven.zoo.options import DataOptions
from halfeven.zoo.tensor_part import tensor_part

TRAININGS = {
    "yolo": (10, 4e-3),
    "retinanet": (20, 3e-3),
    "fcos": (20, 3e-3),
    "ssdlite": (10, 4e-3),
    "efficientdet": (20, 3e-3),
    "rt_detr": (12, 1e-3),
    "yolos": (20, 1e-3),
    "detr": (20, 1e-3),
}
"""Name -> epochs and largest learning rate of the float model's training."""
TARGETS = {"openvino": ".xml", "onnxruntime": ".onnx"}
SIDE, BATCH = 64, 16
NNCF = """
import sys
import numpy, nncf
source, target, data = sys.argv[1:]
batches = list(numpy.load(data)["images"])
if source.endswith(".xml"):
    import openvino
    model = openvino.Core().read_model(source)
    found = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    openvino.save_model(found, target, compress_to_fp16=False)
else:
    import onnx
    model = onnx.load(source)
    name = model.graph.input[0].name
    found = nncf.quantize(model, nncf.Dataset(batches, lambda x: {name: x}), subset_size=len(batches))
    onnx.save(found, target)
"""


class Bench:
    """The data, and what is measured of a model on it."""

    def __init__(self, data: Datasets, task: Detection, sure: float = 0.3) -> None:
        self.data = data
        self.task = task
        self.sure = sure
        self.validation = list(evaluation_loader(data.validation, 40, collate=task.collate))
        self.calibration = [b[0] for b in evaluation_loader(data.calibration, 32, collate=task.collate)]

    def score(self, model: Callable[..., Any]) -> float:
        """Return mAP, 0 to 1."""
        return evaluate(model, self.validation, self.task)["mAP"] / 100

    @torch.no_grad()
    def boxes(self, model: Callable[..., Any]) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for images, targets in self.validation:
            found += self.task.judged(model(images), targets)[0]
        return found

    def agreement(self, floats: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float | None:
        """Return the share of sure boxes of both models that the other has too; None where none is sure."""
        pairs = [pair for one, other in zip(floats, others, strict=True) for pair in ((one, other), (other, one))]
        found = torch.cat([found_again(one, other, self.sure) for one, other in pairs]).float()
        return found.mean().item() if len(found) else None


def found_again(one: dict[str, Tensor], other: dict[str, Tensor], sure: float) -> Tensor:
    """Return for each sure box of an image whether the other model has it, with at least half of that score."""
    certain = one["scores"] >= sure
    near = box_iou(one["boxes"][certain], other["boxes"]) >= 0.5
    same = one["labels"][certain][:, None] == other["labels"][None]
    likely = other["scores"][None] >= sure / 2
    return (near & same & likely).any(1)


def train(model: nn.Module, bench: Bench, epochs: int, rate: float, session: SessionSteps | None = None) -> None:
    """Train with AdamW and a learning rate that rises and falls; with the hooks of a session, quantized."""
    torch.manual_seed(0)
    loader = DataLoader(bench.data.train, BATCH, shuffle=True, drop_last=True, collate_fn=bench.task.collate)  # type: ignore[arg-type]
    given = TrainingOptions(optimizer="adamw", learning_rate=rate, weight_decay=0.02)
    optimizer = make_optimizer(model, given)
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=0.15)
    if session is not None:
        session.start(total)
    step = 0
    for _ in range(epochs):
        for images, targets in loader:
            model.train()
            if session is not None:
                session.before_step()
            outputs = model(images)
            loss = bench.task.loss(outputs, targets)
            if session is not None:
                loss = session.loss(outputs, images, targets, loss)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            step += 1
            if session is not None:
                session.after_step(step)
    model.eval()


def float_detector(name: str, weights: Path | None, data: Datasets, sure: float = 0.3) -> tuple[nn.Module, Bench]:
    """Return a trained float detector."""
    torch.manual_seed(0)
    detector = getattr(small_detectors, name)(data.num_classes)
    example = data.example()
    assert isinstance(example, Tensor)
    bench = Bench(data, detection_of(copy.deepcopy(detector), example), sure)
    model = tensor_part(detector)
    file = None if weights is None else weights / f"{name}.pt"
    if file is not None and file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval(), bench
    train(model, bench, *TRAININGS[name])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model, bench


def measured(qmodel: nn.Module, bench: Bench, floats: Any, target: str, folder: Path, *, files: bool) -> dict[str, Any]:
    """Return mAP of a simulation, and of the file where it can compute that."""
    found = {"simulated": bench.score(qmodel), "agreement": bench.agreement(floats, bench.boxes(qmodel))}
    if files:
        file = he.export(qmodel, folder / f"model{TARGETS[target]}")
        run = load_deployed(file, target, qmodel)
        found |= {"file": bench.score(run), "agreement of the file": bench.agreement(floats, bench.boxes(run))}
    return found


def trained(model: nn.Module, bench: Bench, epochs: int, **options: Any) -> nn.Module:
    """Return the model after quantization-aware training."""
    qmodel = he.prepare(model, bench.calibration[0], batchnorm="fold", **options)
    he.calibrate(qmodel, bench.calibration)
    session = SessionSteps(setup_qat(qmodel, model, bench.calibration), qmodel)
    train(qmodel, bench, epochs, 5e-5, session)
    return session.best(bench.score)


def by_nncf(model: nn.Module, bench: Bench, python: Path, target: str, folder: Path) -> dict[str, Any]:
    """Return mAP of NNCF's file, from the float file."""
    images = bench.calibration[0]
    source, goal, data = (folder / f"{stem}{TARGETS[target]}" for stem in ("float", "nncf", "images"))
    with torch.no_grad():
        names = list(_named(model(images)))
    exported = torch.export.export(_Flat(model), (images,))
    if target == "openvino":
        import openvino

        openvino.save_model(openvino.convert_model(exported), source, compress_to_fp16=False)
    else:
        torch.onnx.export(exported, (), source, dynamo=True, verbose=False, external_data=False)
    np.savez(data.with_suffix(".npz"), images=torch.stack(bench.calibration).numpy())
    subprocess.run(
        [str(python), "-c", NNCF, str(source), str(goal), str(data.with_suffix(".npz"))],
        check=True,
        capture_output=True,
    )
    run = load_deployed(goal, target)

    def outputs(x: Tensor) -> Any:
        # The file has the batch of its export: RT-DETR's code has no free one.
        parts = [run(F.pad(part, (0,) * 7 + (len(images) - len(part),))) for part in x.split(len(images))]
        lists = [[part] if isinstance(part, Tensor) else list(part) for part in parts]
        tensors = [torch.cat(each)[: len(x)] for each in zip(*lists, strict=True)]
        return _restored(dict(zip(names, tensors, strict=True)))

    agreement = bench.agreement(bench.boxes(model), bench.boxes(outputs))
    return {"file": bench.score(outputs), "agreement of the file": agreement}


def _tried(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what is measured, or the reason for which it could not be: the other rows are of use without it."""
    try:
        return measure(*arguments)
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr.decode().strip().splitlines() or [""])[-1]}
    except Exception as error:  # converters raise many kinds
        return {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}


def _named(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors of a detector's outputs by name: a tensor, a dict, or effdet's two lists."""
    if isinstance(outputs, Tensor):
        return {"": outputs}
    if isinstance(outputs, dict):
        return {name: value for name, value in outputs.items() if value is not None}
    return {f"{part}.{level}": each for part, levels in enumerate(outputs) for level, each in enumerate(levels)}


def _restored(outputs: dict[str, Tensor]) -> Any:
    if "" in outputs:
        return outputs[""]
    if "0.0" in outputs:
        return [[each for name, each in outputs.items() if name.startswith(part)] for part in ("0.", "1.")]
    return outputs


class _Flat(nn.Module):
    """Return the outputs as a tuple, which converters keep in order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_named(self.model(x)).values())


class Store:
    """What was measured, by detector, runtime and way; kept in a file, so that a benchmark that was stopped goes on."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.is_file() else {}

    def add(self, keys: tuple[str, ...], measure: Callable[[], Any]) -> None:
        """Measure what is not stored yet, or has failed; print and store it."""
        place = self.rows
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        stored = place.get(keys[-1])
        if stored is not None and "failed" not in str(stored):
            return
        place[keys[-1]] = measure()
        print(*keys, json.dumps(place[keys[-1]]), flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.rows, indent=2))


def add_row(store: Store, name: str, data: Datasets, options: argparse.Namespace) -> None:
    """Measure a detector."""
    start = time.process_time()
    model, bench = float_detector(name, options.weights, data, options.sure)
    floats = bench.boxes(model)
    store.add((name, "seconds of float training"), lambda: time.process_time() - start)
    store.add((name, "float"), lambda: bench.score(model))
    store.add((name, "sure boxes"), lambda: sum(int((one["scores"] >= bench.sure).sum()) for one in floats))

    def after_calibration(target: str, folder: Path, scheme: str) -> dict[str, Any]:
        qmodel = he.quantize(model, bench.calibration, target=target, scheme=scheme)
        return measured(qmodel, bench, floats, target, folder, files=scheme == options.file_scheme)

    def after_training(target: str, folder: Path) -> dict[str, Any]:
        qmodel = trained(model, bench, options.epochs, target=target, scheme=options.file_scheme)
        return measured(qmodel, bench, floats, target, folder, files=True)

    for target in TARGETS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for scheme in dict.fromkeys((options.scheme, options.file_scheme)):
                store.add((name, target, f"PTQ {scheme}"), partial(after_calibration, target, folder, scheme))
            if options.epochs:
                store.add((name, target, f"QAT {options.file_scheme}"), partial(after_training, target, folder))
            if options.nncf is not None:
                by = partial(_tried, by_nncf, model, bench, options.nncf, target, folder)
                store.add((name, target, "NNCF"), by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="detectors; all by default")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--file-scheme", default="w8a8")
    parser.add_argument("--epochs", type=int, default=2, help="of the training of the quantized model; 0: none")
    parser.add_argument("--sure", type=float, default=0.3, help="smallest score of a box whose agreement counts")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--nncf", type=Path, help="Python of an environment with NNCF")
    parser.add_argument("--json", type=Path, help="what was measured; read first, and gone on with")
    options = parser.parse_args()
    data = load_datasets(DataOptions(source="shapes", image_size=SIDE, calibration_samples=256))
    store = Store(options.json)
    for name in options.names or TRAININGS:
        add_row(store, name, data, options)


if __name__ == "__main__":
    main()
