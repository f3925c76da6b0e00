"""MobileNetV2 on CIFAR-10, 8 bits for OpenVINO, without training: as `ptq_openvino_mbv2_8xb32_in1k_calib32xb32.py`.

    halfeven ptq configs/ptq/cifar10_mobilenetv2.py --data.root CIFAR10 --model.weights FLOAT.safetensors

The settings that differ are those of `cifar10_resnet18.py` in this folder.
"""

import dataclasses

from ptq_openvino_mbv2_8xb32_in1k_calib32xb32 import experiment as base

experiment = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, name="mobilenetv2_100", weights="", num_classes=10),
    data=dataclasses.replace(base.data, root="data/cifar10", image_size=32, resize=37, workers=2),
)
