"""The models that `coverage.py` walks, and their inputs. It is not run itself."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from halfeven.zoo.tensor_part import TensorPart

FAMILIES = [
    "beit_base_patch16_224",
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
]
"""The smallest model, by parameters, of each of timm's modules."""


SMALLER = {"deepseek_vit_412m": 224, "gemma4_vit_167m": 224, "qwen3_vit_88m": 224, "sam2_hiera_tiny": 256}
"""Sides of images for models whose own are so large that their attention does not fit into this memory."""


def _detector(name: str) -> nn.Module:
    make = getattr(torchvision.models.detection, name)
    return TensorPart(make(weights=None, weights_backbone=None))


def _segmenter(name: str) -> nn.Module:
    make = getattr(torchvision.models.segmentation, name)
    return make(weights=None, weights_backbone=None)  # type: ignore[no-any-return]


def _transformer(name: str) -> nn.Module:
    """A small model of a class of transformers."""
    import transformers

    layers = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    sizes: dict[str, dict[str, Any]] = {
        "DistilBert": {"n_layers": 2, "dim": 64, "n_heads": 2, "hidden_dim": 128},
        "Swin": {"embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4]},
        "ConvNext": {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128]},
        "Segformer": {},
        "Wav2Vec2": layers,
    }
    config = getattr(transformers, f"{name}Config")(**sizes.get(name, layers))
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


IMAGE, TOKENS, SOUND = "an image", "tokens", "a sound"

OTHERS: dict[str, tuple[Callable[[str], nn.Module], str]] = {
    **{
        name: (lambda name: torchvision.models.get_model(name, weights=None), IMAGE)
        for name in (
            *("resnet18", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1", "shufflenet_v2_x0_5"),
            *("mnasnet0_5", "regnet_y_400mf", "densenet121", "convnext_tiny", "swin_t", "googlenet"),
        )
    },
    **dict.fromkeys(("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50"), (_segmenter, IMAGE)),
    **dict.fromkeys(
        ("ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"), (_detector, IMAGE)
    ),
    **dict.fromkeys(("Bert", "DistilBert"), (_transformer, TOKENS)),
    **dict.fromkeys(("ViT", "DeiT", "Swin", "ConvNext", "Segformer"), (_transformer, IMAGE)),
    "Wav2Vec2": (_transformer, SOUND),
}
"""Models of torchvision and transformers -> what makes them, and what they read."""


def create(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights, and two samples of noise as it reads them."""
    if name in OTHERS:
        model = OTHERS[name][0](name)
    else:
        sized = {"img_size": SMALLER[name]} if name in SMALLER and "vit" in name else {}
        model = timm.create_model(name, **sized)
    return model, _example(name, model)


def _example(name: str, model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    reads = OTHERS[name][1] if name in OTHERS else IMAGE
    if reads == TOKENS:
        ids = torch.randint(1000, (2, 16), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    if reads == SOUND:
        return torch.randn(2, 4000, generator=generator)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    size = (3, SMALLER[name], SMALLER[name]) if name in SMALLER else size
    return torch.randn(2, *size, generator=generator)
