"""Made-up pictures of squares and discs on noise, in the layouts of Pascal VOC and COCO, and sentences in GLUE's."""

import json

import numpy as np
from PIL import Image

COLOURS = {1: (220, 40, 40), 2: (40, 60, 220)}
"""Class -> colour; 1 is square, 2 is round."""


def scene(generator, height, width):
    """A picture, its mask and its boxes with classes."""
    pixels = generator.integers(90, 160, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    boxes, classes = [], []
    rows, columns = np.mgrid[:height, :width]
    for _ in range(2):
        kind, radius = int(generator.integers(1, 3)), int(generator.integers(8, 13))
        y, x = int(generator.integers(radius, height - radius)), int(generator.integers(radius, width - radius))
        if kind == 1:
            inside = (abs(rows - y) <= radius) & (abs(columns - x) <= radius)
        else:
            inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        pixels[inside] = COLOURS[kind]
        mask[inside] = kind
        boxes.append([x - radius, y - radius, x + radius + 1, y + radius + 1])
        classes.append(kind)
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(mask), boxes, classes


def write_voc(root, train=24, val=12, size=(60, 80)):
    """Pascal VOC's folders."""
    base, generator = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for part, count in (("train", train), ("val", val)):
        names = [f"{part}_{number}" for number in range(count)]
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image, mask, _, _ = scene(generator, *size)
            image.save(base / "JPEGImages" / f"{name}.jpg", quality=95)
            mask.save(base / "SegmentationClass" / f"{name}.png")
    return root


def write_coco(root, train=24, val=12, size=(60, 80), empty=0):
    """COCO's folders; `empty` of each part's pictures have no boxes."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", val)):
        (root / f"{part}2017").mkdir()
        images, annotations = [], []
        for number in range(count):
            image, _, boxes, classes = scene(generator, *size)
            image.save(root / f"{part}2017" / f"{number}.jpg", quality=95)
            images.append({"id": number, "file_name": f"{number}.jpg", "height": size[0], "width": size[1]})
            for (left, top, right, bottom), kind in zip(boxes, classes, strict=True) if number >= empty else ():
                box = [left, top, right - left, bottom - top]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": kind, "bbox": box, "iscrowd": 0}
                    | {"area": box[2] * box[3], "segmentation": []}
                )
        categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return root


GOOD, BAD = ("good", "fine", "lovely", "bright"), ("bad", "dull", "awful", "grim")
NEUTRAL = ("the", "film", "plot", "actor", "was", "and", "music", "scene")


def write_glue(root, train=200, dev=60):
    """GLUE's SST-2: sentences with one word that tells."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for name, count in (("train.tsv", train), ("dev.tsv", dev)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = int(generator.integers(2))
            words = list(generator.choice(NEUTRAL, int(generator.integers(3, 7))))
            words.insert(int(generator.integers(len(words) + 1)), str(generator.choice((BAD, GOOD)[label])))
            lines.append(f"{' '.join(words)}\t{label}")
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def write_bert(folder):
    """A very small BERT without weights, and a tokenizer of the words above."""
    from transformers import BertConfig, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NEUTRAL, *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes).save_pretrained(folder)
    return folder
