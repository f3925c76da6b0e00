"""Small models of the kinds that people bring, with the habits that make them hard: several inputs and outputs, tied
weights, heads that return something else in training, loops over levels, recurrence, front ends inside the model.

Each is a builder of a model and of two samples as the model reads them. Widths are small, forms are those of the
networks that carry these names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Brought(NamedTuple):
    """A model and its inputs: a tensor, a tuple of positional or a dict of keyword arguments."""

    model: nn.Module
    example: Any


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution with BatchNorm and SiLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


# ------------------------------------------------------------------------------------------------------------ detectors


class CrossStage(nn.Module):
    """Two paths, of which a chain of residual bottlenecks is applied to the second."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        half = outputs // 2
        self.enter = convolution(inputs, outputs, 1)
        self.chain = nn.ModuleList(
            nn.Sequential(convolution(half, half), convolution(half, half)) for _ in range(depth)
        )
        self.leave = convolution((2 + depth) * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.chain:
            parts.append(parts[-1] + block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class PooledPyramid(nn.Module):
    """Three max pools in a row, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = convolution(width, width // 2, 1)
        self.leave = convolution(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.enter(x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], 5, 1, 2))
        return self.leave(torch.cat(found, 1))


class AnchorFreeHead(nn.Module):
    """Raw maps in training; decoded boxes and class scores in one tensor, with the maps, in eval mode."""

    def __init__(self, widths: tuple[int, ...], classes: int = 5, bins: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.bins = bins
        self.boxes = nn.ModuleList(nn.Sequential(convolution(w, 16), nn.Conv2d(16, 4 * bins, 1)) for w in widths)
        self.scores = nn.ModuleList(nn.Sequential(convolution(w, 16), nn.Conv2d(16, classes, 1)) for w in widths)
        self.register_buffer("values", torch.arange(bins).float(), persistent=False)

    def forward(self, maps: list[Tensor]) -> Any:
        raw = [torch.cat([box(x), score(x)], 1) for box, score, x in zip(self.boxes, self.scores, maps, strict=True)]
        if self.training:
            return raw
        flat = torch.cat([x.flatten(2) for x in raw], 2)
        boxes, scores = flat.split([4 * self.bins, self.classes], 1)
        sides = boxes.unflatten(1, (4, self.bins)).softmax(2)
        distances = (sides * self.values[:, None]).sum(2)
        return torch.cat([distances, scores.sigmoid()], 1), raw


class Yolo(nn.Module):
    """Backbone, a path down and a path up, a head for three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 8, 3, 2), convolution(8, 16, 3, 2), CrossStage(16, 16))
        self.p3 = nn.Sequential(convolution(16, 24, 3, 2), CrossStage(24, 24, 2))
        self.p4 = nn.Sequential(convolution(24, 32, 3, 2), CrossStage(32, 32, 2), PooledPyramid(32))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge3 = CrossStage(24 + 32, 24)
        self.down = convolution(24, 24, 3, 2)
        self.merge4 = CrossStage(24 + 32, 32)
        self.head = AnchorFreeHead((24, 32))

    def forward(self, images: Tensor) -> Any:
        p3 = self.p3(self.stem(images))
        p4 = self.p4(p3)
        low = self.merge3(torch.cat([self.up(p4), p3], 1))
        high = self.merge4(torch.cat([self.down(low), p4], 1))
        return self.head([low, high])


class Detr(nn.Module):
    """A convolutional backbone, an encoder, queries through a decoder, a class and a box of each query."""

    def __init__(self, width: int = 32, queries: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(convolution(3, 16, 3, 2), convolution(16, 24, 3, 2), convolution(24, width, 3, 2))
        self.rows = nn.Parameter(torch.randn(50, width // 2))
        self.columns = nn.Parameter(torch.randn(50, width // 2))
        self.queries = nn.Embedding(queries, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.classes = nn.Linear(width, classes + 1)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        height, width = maps.shape[-2:]
        across = self.columns[:width].unsqueeze(0).expand(height, -1, -1)
        down = self.rows[:height].unsqueeze(1).expand(-1, width, -1)
        tokens = maps.flatten(2).transpose(1, 2) + torch.cat([across, down], -1).flatten(0, 1)
        queries = self.queries.weight.unsqueeze(0).expand(images.shape[0], -1, -1)
        found = self.transformer(tokens, queries)
        return {"pred_logits": self.classes(found), "pred_boxes": self.boxes(found).sigmoid()}


class Fcos(nn.Module):
    """One head for all levels, with a learned scale of each level."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.low = nn.Sequential(convolution(3, 16, 3, 2), convolution(16, 24, 3, 2))
        self.high = convolution(24, 24, 3, 2)
        self.tower = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU()),) * 1
        )
        self.classes = nn.Conv2d(24, classes, 3, padding=1)
        self.sides = nn.Conv2d(24, 4, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0 + level)) for level in range(2))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        low = self.low(images)
        scores, sides = [], []
        for x, scale in zip((low, self.high(low)), self.scales, strict=True):
            features = self.tower(x)
            scores.append(self.classes(features))
            sides.append((self.sides(features) * scale).exp())
        return scores, sides


# ------------------------------------------------------------------------------------------------------- dense outputs


class Unet(nn.Module):
    """Three levels; each is resized to the size of its skip connection."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 24)
        self.down = nn.ModuleList(convolution(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList((convolution(24 + 16, 16), convolution(16 + 8, 8)))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.head(x)


class SuperResolution(nn.Module):
    """Residual blocks without BatchNorm, a pixel shuffle, and the resized image added at the end."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )
        self.leave = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Tensor:
        first = x = self.enter(images)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.leave(x + first) + F.interpolate(images, scale_factor=2, mode="bicubic")


class Vocoder(nn.Module):
    """Transposed convolutions, each followed by dilated residual blocks."""

    def __init__(self, mels: int = 20, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv1d(mels, width, 7, padding=3)
        self.up = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for number in range(2):
            now = width >> (number + 1)
            self.up.append(nn.ConvTranspose1d(2 * now, now, 16, 8, 4))
            self.blocks.append(nn.ModuleList(nn.Conv1d(now, now, 3, padding=d, dilation=d) for d in (1, 3)))
        self.leave = nn.Conv1d(now, 1, 7, padding=3)

    def forward(self, mels: Tensor) -> Tensor:
        x = self.enter(mels)
        for up, blocks in zip(self.up, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            for block in blocks:
                x = x + block(F.leaky_relu(x, 0.1))
        return self.leave(F.leaky_relu(x, 0.1)).tanh()


# ------------------------------------------------------------------------------------------------ sounds, points, video


class KeywordNet(nn.Module):
    """A Fourier transform as a convolution, mel filters, a logarithm, then separable convolutions."""

    def __init__(self, bins: int = 64, mels: int = 20, classes: int = 6) -> None:
        super().__init__()
        frequencies = torch.arange(bins // 2 + 1)[:, None] * torch.arange(bins) * (2 * torch.pi / bins)
        window = torch.hann_window(bins)
        self.transform = nn.Conv1d(1, 2 * (bins // 2 + 1), bins, bins // 2, bias=False)
        self.transform.weight = nn.Parameter(
            torch.cat([frequencies.cos(), frequencies.sin()])[:, None] * window, requires_grad=False
        )
        self.register_buffer("filters", torch.rand(mels, bins // 2 + 1) / bins)
        self.body = nn.Sequential(
            convolution(1, 16, 3, 2), convolution(16, 16, 3, 1, 16), convolution(16, 24, 1), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(24, classes)

    def forward(self, sound: Tensor) -> Tensor:
        real, imaginary = self.transform(sound.unsqueeze(1)).chunk(2, 1)
        mels = self.filters @ (real.square() + imaginary.square())
        return self.head(self.body((mels + 1e-6).log().unsqueeze(1)).flatten(1))


class PointNet(nn.Module):
    """Points turned by a matrix that the net itself finds, a maximum over all points."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix = nn.Linear(16, 9)
        self.features = nn.Sequential(
            nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU()
        )
        self.head = nn.Sequential(
            nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, classes)
        )

    def forward(self, points: Tensor) -> Tensor:
        turned = self.matrix(self.align(points).max(2)[0]).view(-1, 3, 3) + torch.eye(3, device=points.device)
        aligned = torch.bmm(points.transpose(1, 2), turned).transpose(1, 2)
        return self.head(torch.max(self.features(aligned), 2)[0])


class Siamese(nn.Module):
    """One backbone with BatchNorm on two images, the distance of both through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(convolution(3, 8, 3, 2), convolution(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(16, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        first = self.backbone(left).flatten(1)
        second = self.backbone(right).flatten(1)
        return self.head((first - second).abs())


class Video(nn.Module):
    """Convolutions over space, then over time, with a residual connection."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = self._block(3, 8, (1, 3, 3), (1, 2, 2))
        self.space = self._block(8, 8, (1, 3, 3), (1, 1, 1))
        self.time = self._block(8, 8, (3, 1, 1), (1, 1, 1))
        self.head = nn.Linear(8, classes)

    @staticmethod
    def _block(inputs: int, outputs: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> nn.Sequential:
        padding = tuple(size // 2 for size in kernel)
        layer = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
        return nn.Sequential(layer, nn.BatchNorm3d(outputs), nn.ReLU())

    def forward(self, frames: Tensor) -> Tensor:
        x = self.stem(frames)
        x = x + self.time(self.space(x))
        return self.head(x.mean((2, 3, 4)))


# --------------------------------------------------------------------------------------------------------------- texts


class Tagger(nn.Module):
    """Tagging: an embedding, a recurrence both ways, a class of each token."""

    def __init__(self, cell: type[nn.LSTM | nn.GRU] = nn.LSTM, width: int = 16, words: int = 60, tags: int = 5) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.recurrence = cell(width, width, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(2 * width, tags)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tags(self.recurrence(self.words(ids))[0])


class Gpt(nn.Module):
    """Causal attention, and an output layer that shares the embedding's weight."""

    def __init__(self, words: int = 60, width: int = 32, heads: int = 4, longest: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "after": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = x + self._attend(block, block["before"](x))
            x = x + block["mlp"](block["after"](x))
        return self.head(self.norm(x))

    def _attend(self, block: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in block["qkv"](x).chunk(3, 2))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return block["out"](found.transpose(1, 2).flatten(2))


class TextEncoder(nn.Module):
    """A transformer's encoder with a mask of padding, averaged over the tokens that are there."""

    def __init__(self, words: int = 60, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        there = attention_mask.bool()
        x = self.encoder(self.words(input_ids), src_key_padding_mask=~there)
        weights = there.unsqueeze(2).float()
        pooled = (x * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return {"pooled": pooled, "logits": self.head(pooled)}


# -------------------------------------------------------------------------------------------- habits of training modes


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.weight * gradient, None


class DomainAdaptation(nn.Module):
    """A classifier, and a second one of the domain, behind a gradient that is turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(convolution(3, 8, 3, 2), convolution(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.classes = nn.Linear(16, 4)
        self.domain = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(images).flatten(1)
        return self.classes(x), self.domain(_Reverse.apply(x, 0.5))


class DeepSupervision(nn.Module):
    """A second classifier that returns its answer in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.low = convolution(3, 8, 3, 2)
        self.high = convolution(8, 16, 3, 2)
        self.auxiliary = nn.Linear(8, 4)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Any:
        low = self.low(images)
        answer = self.head(self.high(low).mean((2, 3)))
        return (answer, self.auxiliary(low.mean((2, 3)))) if self.training else answer


def _noise(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _ids(length: int = 12, words: int = 60) -> Tensor:
    return torch.randint(1, words, (2, length), generator=torch.Generator().manual_seed(0))


def _padded(length: int = 12) -> dict[str, Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {"input_ids": _ids(length) * mask, "attention_mask": mask}


BROUGHT: dict[str, Callable[[], Brought]] = {
    "yolo": lambda: Brought(Yolo(), _noise(3, 64, 64)),
    "detr": lambda: Brought(Detr(), _noise(3, 64, 64)),
    "fcos": lambda: Brought(Fcos(), _noise(3, 32, 32)),
    "unet": lambda: Brought(Unet(), _noise(3, 32, 32)),
    "super_resolution": lambda: Brought(SuperResolution(), _noise(3, 16, 16)),
    "vocoder": lambda: Brought(Vocoder(), _noise(20, 8)),
    "keyword_net": lambda: Brought(KeywordNet(), _noise(1024)),
    "pointnet": lambda: Brought(PointNet(), _noise(3, 64)),
    "siamese": lambda: Brought(Siamese(), (_noise(3, 32, 32), _noise(3, 32, 32).flip(0))),
    "video": lambda: Brought(Video(), _noise(3, 4, 16, 16)),
    "bilstm": lambda: Brought(Tagger(), _ids()),
    "gpt_tied": lambda: Brought(Gpt(), _ids()),
    "text_encoder": lambda: Brought(TextEncoder(), _padded()),
    "domain_adaptation": lambda: Brought(DomainAdaptation(), _noise(3, 16, 16)),
    "deep_supervision": lambda: Brought(DeepSupervision(), _noise(3, 16, 16)),
}
"""Names -> builders."""
