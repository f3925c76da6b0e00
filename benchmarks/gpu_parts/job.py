"""What the parts of the GPU benchmark share: the device, the networks, and the time that is left."""

import time
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass
class Job:
    """One run of the benchmark."""

    device: torch.device
    small: bool
    """Two convolutions and a small transformer on small images, to try the script."""
    deadline: float
    """`time.monotonic()` at which the run ends; parts do not begin what they cannot finish."""
    networks: tuple[str, ...] = ("resnet50", "vit_small_patch16_224")
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def report(self, part: str, **found: Any) -> None:
        """Print a row, and keep it."""
        self.rows.append({"part": part, **found})
        print(f"{part}: " + ", ".join(f"{name} {shown(value)}" for name, value in found.items()), flush=True)

    def wait(self) -> None:
        """Wait until the device has computed."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Convolutions(nn.Module):
    """The small network of convolutions, with BatchNorm and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        found: Tensor = self.last((x + self.second(x)).relu().mean((2, 3)))
        return found


def network(job: Job, name: str) -> nn.Module:
    """Return the float model of a name, with random weights, on the CPU."""
    torch.manual_seed(0)
    if not job.small:
        return timm.create_model(name)
    if name.startswith("vit"):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
        return timm.models.VisionTransformer(**sizes)
    return Convolutions()


def images(job: Job, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = 32 if job.small else 224
    return torch.randn(batch, 3, size, size, generator=generator)


def classes(job: Job) -> int:
    return 10 if job.small else 1000
