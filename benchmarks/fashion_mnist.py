"""What the benchmarks on Fashion-MNIST share: the images, the float models, and their accuracy. It is not run itself.

The float models are timm's, with in_chans=1 and num_classes=10; their weights come by a path. The images are those of
Debian's package dataset-fashion-mnist, padded to 32x32.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Images = tuple[Tensor, Tensor]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of what all of them are given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name of the float model")
    parser.add_argument("weights", type=Path, help="its .safetensors")
    parser.add_argument("--root", default="auto", help="folder of the IDX files; not given: Debian's")
    parser.add_argument("--json", type=Path)
    return parser


def float_model(name: str, weights: Path) -> nn.Module:
    """The float model, in eval mode."""
    model = timm.create_model(name, in_chans=1, num_classes=10)
    model.load_state_dict(load_file(weights))
    return model.eval()


def images_of(dataset: object, count: int | None = None) -> Images:
    """A data set as two tensors."""
    samples = [dataset[i] for i in range(count or len(dataset))]  # type: ignore[index,arg-type]
    return torch.stack([torch.as_tensor(s[0]) for s in samples]), torch.tensor([int(s[1]) for s in samples])


def test_and_training(root: str) -> tuple[Images, Images]:
    """The 10,000 test images and the 60,000 training images."""
    from halfeven.zoo.datasets import load_datasets  # environments of peers need not have it
    from halfeven.zoo.options import DataOptions

    datasets = load_datasets(DataOptions(source="fashion_mnist", root=root))
    return images_of(datasets.validation), images_of(datasets.train)


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * right / len(labels)
