"""Accuracy of quantization-aware training on Fashion-MNIST by bit-width, against the float model trained for as long.

    python benchmarks/qat.py resnet18 WEIGHTS.safetensors [--schemes w8a8 w4a4] [--steps 100] [--seeds 0 1 2]
    python benchmarks/qat.py mobilenetv2_100 WEIGHTS.safetensors --schemes w4a4 --settings recipe plain ...
    python benchmarks/qat.py resnet18 WEIGHTS.safetensors --schemes w4a4 --steps 2000 --rate 0.02 --decay 0.995
    python benchmarks/qat.py resnet18 WEIGHTS.safetensors --peers nncf=ENV/bin/python torchao=ENV2/bin/python

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path. A seed draws 512 training
images for calibration and the order of the training images, the same for every model: SGD with momentum 0.9, learning
rate 0.01 (`--rate`) falling by a cosine, batches of 64. Every layer is quantized. Accuracy is that of all 10,000 test
images. Where a recipe averages the weights, the better of weights and average counts; the float model's average with
the same decay stands beside it. "start" is the model before the first step: calibrated, or with learned rounding
where the recipe starts from it. Peers do the same under the Python of an environment that has them; see `peers.py`.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from estimators import dsq, ewgs, passed_by
from fashion_mnist import Images, arguments, float_model, test_and_training, top1
from torch import Tensor, nn
from torch.nn import functional as F

import halfeven as he
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.pipelines import setup_qat
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.ema import AveragingOptions, WeightEMA
from halfeven.qat.options import QATOptions
from halfeven.quantization.scheme import parse_bits
from halfeven.training.optimization import make_optimizer
from halfeven.training.options import TrainingOptions

BATCH, CALIBRATION = 64, 512
OFF = {"equalize": "off", "start": "ranges", "distill": "off", "average": "off"}
"""LSQ alone: learned scales from calibrated ranges."""

BOTTLENECKS = tuple(he.Rule(pattern=name, activation_bits=8) for name in ("blocks.0.0.conv_pw", "*.conv_pwl", "*.add"))
"""MobileNetV2's tensors without an activation function: what is added, and the sums."""

SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "recipe, ends and bottlenecks of 8 bits": {"quantization": {"first_and_last_bits": 8, "rules": BOTTLENECKS}},
    "recipe, BatchNorm live": {"schedule": ScheduleOptions(freeze_batchnorm_after=1.0)},
    "recipe, BatchNorm frozen": {"schedule": ScheduleOptions(freeze_batchnorm_after=0.0)},
    "plain": {"qat": OFF},
    "plain, observed": {"qat": OFF, "quantization": {"ranges": "observed"}},
    "plain, calibrated": {"qat": OFF, "quantization": {"ranges": "calibrated"}},
    "plain, PACT": {"qat": OFF, "quantization": {"ranges": "clipped"}},
    "plain, log scales": {"qat": OFF, "quantization": {"scale_domain": "log"}},
    "plain, LSQ+": {"qat": OFF, "quantization": {"learn_zero_points": True}},
    "plain, folded": {"qat": OFF, "quantization": {"batchnorm": "fold"}},
    "plain, per tensor, kept": {"qat": OFF, "quantization": {"per_channel": False}},
    "plain, per tensor, folded": {"qat": OFF, "quantization": {"batchnorm": "fold", "per_channel": False}},
    "plain, per tensor, folded, equalized": {
        "qat": {**OFF, "equalize": "on"},
        "quantization": {"batchnorm": "fold", "per_channel": False},
    },
    "plain, per tensor, folded live": {"qat": OFF, "quantization": {"batchnorm": "fold live", "per_channel": False}},
    "plain, frozen oscillations": {"qat": {**OFF, "freeze_oscillations": "on"}},
    "plain, dampened oscillations": {"qat": {**OFF, "dampen_oscillations": "on"}},
    "plain, distillation": {"qat": {**OFF, "distill": "on"}},
    "plain, distillation, half": {"qat": {**OFF, "distill": "on", "distillation": DistillationOptions(weight=0.5)}},
    "plain, average": {"qat": {**OFF, "average": "on"}},
    "plain, progressive": {"qat": {**OFF, "progress": "on"}},
    "plain, AdaRound start": {"qat": {**OFF, "start": "layers"}},
    "plain, block start": {"qat": {**OFF, "start": "blocks"}},
    "plain, ends of 8 bits": {"qat": OFF, "quantization": {"first_and_last_bits": 8}},
    **{f"plain, EWGS {strength}": {"qat": OFF, "gradient": ewgs(strength)} for strength in (0.02, 0.2)},
    **{f"plain, DSQ {alpha}": {"qat": OFF, "gradient": dsq(alpha)} for alpha in (0.2, 0.4)},
}
"""Name -> changes of the options of training (`qat`), quantization and `schedule`, on top of the defaults; another
`gradient`."""


class Batches:
    """Batch `step` of the training images in the order of a seed, epoch after epoch."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels, self.seed = images, labels, seed
        self.each = len(images) // BATCH

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        index = self.index(step)
        return self.images[index], self.labels[index]

    def index(self, step: int) -> Tensor:
        """Where the images of a batch are, [batch]; steps are asked for in their order."""
        epoch, place = divmod(step, self.each)
        if place == 0 or not hasattr(self, "order"):
            generator = torch.Generator().manual_seed(self.seed + 1000 * epoch)
            self.order = torch.randperm(len(self.images), generator=generator)
        return self.order[place * BATCH : (place + 1) * BATCH]


def drawn(training: Images, seed: int, count: int) -> tuple[Tensor, ...]:
    """The first `count` of the training images in the order of a seed, in batches."""
    choice = torch.randperm(len(training[0]), generator=torch.Generator().manual_seed(seed))
    return training[0][choice[:count]].split(BATCH)


def descend(
    model: nn.Module,
    batches: Batches,
    steps: int,
    rate: float,
    session: Any = None,
    average: WeightEMA | None = None,
) -> float:
    """Train, and keep an average of a model without a session; seconds that it took."""
    options = TrainingOptions(learning_rate=rate, weight_decay=0.0)
    optimizer = make_optimizer(model, options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        images, labels = batches(step)
        if session is not None:
            session.before_step(model, step / steps)
        outputs = model(images)
        if session is None:
            loss = F.cross_entropy(outputs, labels)
        else:
            loss = session.loss(outputs, images, labels, F.cross_entropy(outputs, labels))
            penalty = session.penalty(step / steps)
            loss = loss if penalty is None else loss + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if session is not None:
            session.after_step(step, (step + 1) / steps)
        if average is not None:
            average.update(step)
    return time.perf_counter() - started


def trained(
    model: nn.Module, scheme: str, changes: dict[str, Any], options: argparse.Namespace, training: Images, seed: int,
    accuracy: Callable[[nn.Module], float],
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """One run: the better of the weights and their average, and accuracies at the start and at the end."""
    calibration, others = drawn(training, seed, CALIBRATION), drawn(training, seed, 50 * BATCH)
    placement = {"ranges": "learned", **changes.get("quantization", {})}
    qmodel = he.calibrate(he.prepare(model, calibration[0], scheme=scheme, **placement), calibration)
    started = time.perf_counter()
    qat = QATOptions(**{"averaging": AveragingOptions(decay=options.decay), **changes.get("qat", {})})
    session = setup_qat(qmodel, model, calibration, qat, changes.get("schedule"), inputs=lambda: others)
    result: dict[str, Any] = {"start, s": round(time.perf_counter() - started, 1), "start": accuracy(qmodel)}
    with passed_by(changes.get("gradient")):
        seconds = descend(qmodel, Batches(*training, seed), options.steps, options.rate, session)
    result["training, s"] = round(seconds, 1)
    plain = copy.deepcopy(qmodel)
    result["running statistics"] = accuracy(plain)
    re_estimate(plain, others)
    result["re-estimated"] = accuracy(plain)
    forms = {"weights": qmodel, **session.other_models}
    for name, form in forms.items():
        session.before_validation(form)
        result[name] = accuracy(form)
    best = max(forms, key=lambda name: result[name])
    return forms[best], result | {"end": result[best], **session.figures()}


def by_peer(
    peer: str, python: str, scheme: str, options: argparse.Namespace, training: Images, test: Images, seed: int
) -> dict[str, Any]:
    """The same run by another library, in its own environment; its error in place of figures that it has not."""
    batches = Batches(*training, seed)
    job = {
        "peer": peer,
        "model": options.model,
        "weights": str(options.weights),
        "bits": parse_bits(scheme),
        "rate": options.rate,
        "images": training[0],
        "labels": training[1],
        "test": test,
        "calibration": drawn(training, seed, CALIBRATION),
        "order": torch.stack([batches.index(step) for step in range(options.steps)]),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(job, path := Path(folder) / "job.pt")
        command = [python, str(Path(__file__).with_name("peers.py")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"start": float("nan"), "end": float("nan"), "error": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def verified(qmodel: nn.Module, images: Tensor) -> dict[str, Any]:
    """Export a model to OpenVINO and compare the file with it, on its integers and its answers."""
    with tempfile.TemporaryDirectory() as folder:
        report = he.verify(qmodel, he.export(qmodel.eval(), Path(folder) / "model.xml"), images.split(32))
        print(report, flush=True)
        return {**report.to_dict(), "tensors": None}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--schemes", nargs="*", default=["w8a8", "w4a4"])
    parser.add_argument("--settings", nargs="+", default=["recipe"], choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of the first step")
    parser.add_argument("--decay", type=float, default=0.99, help="of the average of the weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-float", action="store_true", help="leave out the float model's own training")
    parser.add_argument("--peers", nargs="*", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--verify", type=int, default=0, help="test images to verify each deployed file on")
    options = parser.parse_args()

    test, training = test_and_training(options.root)
    model = float_model(options.model, options.weights)

    def accuracy(one: nn.Module) -> float:
        return top1(one, *test)

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    facts = {"model": options.model, "steps": options.steps, "date": str(date.today()), "machine": machine}
    rows: dict[str, list[dict[str, Any]]] = {}

    def record(name: str, result: dict[str, Any]) -> None:
        rows.setdefault(name, []).append(result)
        print(f"{options.model} {name}: {result}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(facts | {"runs": rows}, indent=2))

    print(f"{options.model}: float {accuracy(model):.2f}", flush=True)
    for seed in options.seeds:
        if not options.no_float:
            floating = copy.deepcopy(model)
            average = WeightEMA(floating, AveragingOptions(decay=options.decay))
            seconds = descend(floating, Batches(*training, seed), options.steps, options.rate, average=average)
            record("float", {"end": accuracy(floating), "training, s": round(seconds, 1)})
            record("float, average", {"end": accuracy(average.model)})
        for scheme in options.schemes:
            for setting in options.settings:
                qmodel, result = trained(model, scheme, SETTINGS[setting], options, training, seed, accuracy)
                result |= {"verify": verified(qmodel, test[0][: options.verify])} if options.verify else {}
                record(f"{scheme} {setting}", result)
            for peer, python in (found.split("=", 1) for found in options.peers):
                record(f"{scheme} {peer}", by_peer(peer, python, scheme, options, training, test, seed))
    print(f"{'':50} start    end   (medians over seeds {options.seeds})")
    for name, runs in rows.items():
        start, end = (statistics.median(run.get(key, float("nan")) for run in runs) for key in ("start", "end"))
        print(f"{options.model} {name:40} {start:6.2f} {end:6.2f}  {[run['end'] for run in runs]}")


if __name__ == "__main__":
    main()
