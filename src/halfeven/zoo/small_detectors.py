"""Small detectors of known kinds, to train on the made-up scenes of `halfeven.zoo.shapes`, 64 x 64 pixels.

Each function makes one, with its own loss and post-processing, for `model.source="callable"`; `num_classes` counts the
background.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from halfeven.imports import extra
from halfeven.zoo.yolo import Yolo


def _layer(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


class Residual(nn.Module):
    """Add two convolutions to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _layer(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.relu(x + self.second(self.first(x)))
        return added


class Pyramid(nn.Module):
    """Compute features at an eighth and a sixteenth of the resolution, by a residual network and a top-down sum."""

    def __init__(self, width: int = 16, out_channels: int = 32) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(_layer(3, width, 2), _layer(width, width, 2), Residual(width))
        self.middle = nn.Sequential(_layer(width, 2 * width, 2), Residual(2 * width))
        self.deep = nn.Sequential(_layer(2 * width, 4 * width, 2), Residual(4 * width))
        self.lateral = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in (2 * width, 4 * width))
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        middle = self.middle(self.stem(x))
        deep = self.lateral[1](self.deep(middle))
        up = nn.functional.interpolate(deep, scale_factor=2)
        return {"0": self.smooth(self.lateral[0](middle) + up), "1": deep}


def yolo(num_classes: int) -> nn.Module:
    """Make a detector of YOLO's shape, without non-maximum suppression."""
    return Yolo(num_classes)


def retinanet(num_classes: int) -> Any:
    """Make torchvision's RetinaNet on two levels."""
    with extra("train", "torchvision's detectors"):
        from torchvision.models.detection import RetinaNet
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.retinanet import RetinaNetHead

    anchors = AnchorGenerator(((10, 14), (19, 26)), ((1.0,),) * 2)
    # Without BatchNorm, the small initial weights of the head take long to get going.
    head = RetinaNetHead(32, 2, num_classes, norm_layer=nn.BatchNorm2d)
    return RetinaNet(Pyramid(), num_classes, anchor_generator=anchors, head=head)


def fcos(num_classes: int) -> Any:
    """Make torchvision's FCOS on two levels."""
    with extra("train", "torchvision's detectors"):
        from torchvision.models.detection import FCOS
        from torchvision.models.detection.anchor_utils import AnchorGenerator

    return FCOS(Pyramid(), num_classes, anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2))


def ssdlite(num_classes: int) -> Any:
    """Make torchvision's SSDlite: depthwise convolutions with ReLU6, and heads on two levels."""
    with extra("train", "torchvision's detectors"):
        from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
        from torchvision.models.detection.ssd import SSD
        from torchvision.models.detection.ssdlite import SSDLiteHead

    anchors = DefaultBoxGenerator([[1], [1]], scales=[0.2, 0.33, 0.45])
    backbone = _Depthwise()
    head = SSDLiteHead(backbone.out_channels, anchors.num_anchors_per_location(), num_classes, nn.BatchNorm2d)
    return SSD(backbone, anchors, (64, 64), num_classes, head=head, score_thresh=0.01, topk_candidates=100)


class _Depthwise(nn.Module):
    """Compute features at an eighth and a sixteenth of the resolution by inverted residuals."""

    def __init__(self) -> None:
        super().__init__()
        with extra("train", "torchvision's detectors"):
            from torchvision.models.mobilenetv2 import InvertedResidual
            from torchvision.ops import Conv2dNormActivation

        normal: Any = {"norm_layer": nn.BatchNorm2d}
        self.out_channels = [48, 64]
        block = partial(InvertedResidual, **normal)
        stem = Conv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6, **normal)
        self.first = nn.Sequential(
            *(stem, block(16, 24, 2, 4), block(24, 24, 1, 4), block(24, 48, 2, 4), block(48, 48, 1, 4))
        )
        self.second = nn.Sequential(block(48, 64, 2, 4), block(64, 64, 1, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        return {"0": first, "1": self.second(first)}


def efficientdet(num_classes: int, image_size: int = 64) -> Any:
    """Make effdet's EfficientDet on three levels: a weighted pyramid in both directions, separable convolutions."""
    with extra("detection", "EfficientDet"):
        from effdet import EfficientDet, get_efficientdet_config

    config = get_efficientdet_config("tf_efficientdet_lite0")
    config.update(
        {"name": "small", "backbone_name": "resnet10t", "image_size": (image_size, image_size)}
        | {"num_classes": num_classes - 1, "min_level": 3, "max_level": 5, "num_levels": 3, "num_scales": 1}
        | {"fpn_channels": 32, "fpn_cell_repeats": 1, "box_class_repeats": 1, "anchor_scale": 2.0}
        | {"aspect_ratios": [(1.0, 1.0)], "backbone_args": {"drop_path_rate": 0.0}}
    )
    return EfficientDet(config, pretrained_backbone=False)


def _resnet(hidden_sizes: list[int], out_features: list[str]) -> Any:
    from transformers import RTDetrResNetConfig

    sizes: Any = {"embedding_size": hidden_sizes[0], "hidden_sizes": hidden_sizes, "depths": [1] * len(hidden_sizes)}
    return RTDetrResNetConfig(layer_type="basic", out_features=out_features, **sizes)


def rt_detr(num_classes: int) -> Any:
    """Make transformers' RT-DETR: two levels, deformable attention, boxes that each decoder layer refines."""
    with extra("text", "transformers' detectors"):
        from transformers import RTDetrConfig, RTDetrForObjectDetection

    levels: Any = {"encoder_in_channels": [48, 64], "feat_strides": [8, 16], "encode_proj_layers": [1]}
    levels |= {"decoder_in_channels": [64, 64], "num_feature_levels": 2}
    sizes: Any = {"encoder_hidden_dim": 64, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2, "num_queries": 30}
    config = RTDetrConfig(
        backbone_config=_resnet([24, 48, 64], ["stage2", "stage3"]),
        freeze_backbone_batch_norms=False,
        num_denoising=0,
        num_labels=num_classes,
        **levels,
        **sizes,
    )
    return RTDetrForObjectDetection(config)


def detr(num_classes: int) -> Any:
    """Make transformers' DETR: an encoder and a decoder on one level, with learned queries."""
    with extra("text", "transformers' detectors"):
        from transformers import AutoBackbone, DetrConfig, DetrForObjectDetection

    sizes: Any = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2, "num_queries": 20}
    sizes |= {"init_std": 0.1}  # 0.02 is for wider layers, and would leave the queries of these alike
    config = DetrConfig(backbone_config=_resnet([24, 48], ["stage2"]), dropout=0.0, num_labels=num_classes, **sizes)
    detector = DetrForObjectDetection(config)
    # DETR expects a trained backbone, and freezes its BatchNorm and weights. This one is trained from scratch.
    detector.model.backbone.model = AutoBackbone.from_config(config.backbone_config)
    # Queries that start alike find the same box; those of the paper start as far apart as this.
    nn.init.normal_(detector.model.query_position_embeddings.weight)
    return detector


def yolos(num_classes: int, image_size: int = 64) -> Any:
    """Make transformers' YOLOS: a vision transformer with detection tokens."""
    with extra("text", "transformers' detectors"):
        from transformers import YolosConfig, YolosForObjectDetection

    sizes: Any = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
    config = YolosConfig(
        image_size=[image_size, image_size],
        patch_size=8,
        num_detection_tokens=20,
        use_mid_position_embeddings=False,
        num_labels=num_classes,
        **sizes,
    )
    detector = YolosForObjectDetection(config)
    # transformers leaves them at 0, where all detection tokens are alike, and find the same box.
    for tokens in (detector.vit.embeddings.detection_tokens, detector.vit.embeddings.position_embeddings):
        nn.init.trunc_normal_(tokens, std=0.02)
    return detector
