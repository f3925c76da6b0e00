"""MobileNetV2 on ImageNet, 8 bits for OpenVINO, without training: as `ptq_openvino_resnet18_8xb32_in1k_calib32xb32.py`.

timm's own weights are trained longer than those of MMRazor's config of the same name. For those, give
`--model.weights FILE` with mmpretrain's mobilenet-v2_8xb32_in1k (or torchvision's first weights, which are near).
"""

import dataclasses

from ptq_openvino_resnet18_8xb32_in1k_calib32xb32 import experiment as base

experiment = dataclasses.replace(base, model=dataclasses.replace(base.model, name="mobilenetv2_100.ra_in1k"))
