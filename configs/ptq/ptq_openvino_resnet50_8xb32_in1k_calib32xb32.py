"""ResNet-50 on ImageNet, 8 bits for OpenVINO, without training: as `ptq_openvino_resnet18_8xb32_in1k_calib32xb32.py`.

The float weights are torchvision's first ones, trained as those of MMRazor's config of the same name.
"""

import dataclasses

from ptq_openvino_resnet18_8xb32_in1k_calib32xb32 import experiment as base

experiment = dataclasses.replace(base, model=dataclasses.replace(base.model, name="resnet50.tv_in1k"))
